"""Text from the file to the trained model: shards by data/prepare.py, boundaries, bits per byte, samples."""

from __future__ import annotations

import json
import math

import pytest
from helpers import TINY, make_quick, metrics, run

from bench import text
from data import prepare
from data.files import UserError
from extras import decode

LINES = "the cat sat on the mat\nand the dog ran after it\n\n"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A folder of shards of bytes, made from a small file."""
    make_quick(monkeypatch)
    (tmp_path / "corpus.txt").write_text(LINES * 300, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["--from", "corpus.txt", "--tokenizer", "bytes", "--out", "shards"]) == 0
    return tmp_path / "shards"


def test_a_prepared_folder_is_trained_on(shards, tmp_path, capsys):
    arguments = ["--dataset", "fineweb", "--data-dir", shards, "--block-size", "64", *TINY, "--max-steps", "4"]
    assert run(*arguments, "--eval-every", "2", "--reset-at-document", "--out-dir", "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["model"]
    assert config["vocab_size"] == 384 and config["document_token"] == 256
    found = [line for line in metrics(tmp_path / "run") if "val_loss" in line]
    assert [line["step"] for line in found] == [2, 4]
    documents = 1 / (len(LINES) - 1)  # end-of-text tokens, which spell no byte, for each token
    for line in found:
        bits = line["val_loss"] / math.log(2)
        assert bits < line["bits_per_byte"] < bits * (1 + 2 * documents)
        assert line["sample"].startswith("<|endoftext|>the cat") and " | " in line["sample"]
    assert found[0]["sample"] != found[1]["sample"] or found[0]["val_loss"] == found[1]["val_loss"]
    out = capsys.readouterr().out
    assert "bits_per_byte:" in out and out.endswith("next:             python sample.py run\n")


def test_without_its_tokenizer_the_sample_says_why(shards, monkeypatch):
    def unreachable(name):
        raise UserError(f"{name}: cannot be downloaded")

    decode.tokenizer_at_hand.cache_clear()
    monkeypatch.setattr(decode, "load_tokenizer", unreachable)
    arguments = ["--dataset", "fineweb", "--data-dir", shards, "--block-size", "64", *TINY, "--max-steps", "1"]
    assert run(*arguments, "--out-dir", "run") == 0
    decode.tokenizer_at_hand.cache_clear()
    last = metrics(shards.parent / "run")[-1]
    assert last["sample"] == "none: bytes: cannot be downloaded" and "bits_per_byte" not in last


def test_the_benchmark_gives_a_row_for_a_model(shards, tmp_path):
    row = text.one(tmp_path, shards, "attention", seed=0, minutes=0.01)
    assert row["steps"] >= 1 and row["val_loss"] / math.log(2) < row["bits_per_byte"] and row["parameters"] > 500_000
    assert {"model": "attention", "seed": 0, "flags": text.MODELS["attention"]}.items() <= row.items()


@pytest.mark.parametrize("what, said", [("cut", "bytes that meta.json names"), ("json", "cannot be read as JSON"),
                                        ("size", "does not describe shards")])
def test_a_folder_that_is_not_what_meta_json_says_is_refused(what, said, shards, tmp_path, capsys):
    meta = shards / "meta.json"
    if what == "cut":
        shard = next(shards.glob("*train*.npy"))
        shard.write_bytes(shard.read_bytes()[:-2])
    elif what == "json":
        meta.write_text(meta.read_text(encoding="utf-8")[:40], encoding="utf-8")
    else:
        value = json.loads(meta.read_text(encoding="utf-8"))
        meta.write_text(json.dumps(value | {"vocab_size": "many"}), encoding="utf-8")
    arguments = ["--dataset", "fineweb", "--data-dir", shards, "--block-size", "64", *TINY, "--max-steps", "1"]
    assert run(*arguments, "--out-dir", "run") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
