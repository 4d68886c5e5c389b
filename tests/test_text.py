"""Text from the file to the trained model: shards by data/prepare.py, boundaries, bits per byte, samples."""

import json
import math
from unittest.mock import Mock

import pytest
from helpers import TINY, exit_code, make_quick, metrics, one_thread, run  # noqa: F401

import sample
from bench import text
from data import prepare
from data.files import UserError
from extras import decode

LINES = "the cat sat on the mat\nand the dog ran after it\n\n"
TRAIN = ["--dataset", "fineweb", "--data-dir", "shards", "--block-size", "64", *TINY, "--out-dir", "run"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with shards/, bytes made from a small file; runs in it draw no pictures."""
    make_quick(monkeypatch)
    (tmp_path / "corpus.txt").write_text(LINES * 300, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["--from", "corpus.txt", "--tokenizer", "bytes", "--out", "shards"]) == 0
    return tmp_path


def test_a_prepared_folder_is_trained_on_and_sampled_from(folder, capsys):
    assert run(*TRAIN, "--max-steps", "4", "--eval-every", "2", "--reset-at-document") == 0
    config = json.loads((folder / "run" / "config.json").read_text(encoding="utf-8"))["model"]
    assert config["vocab_size"] == 384 and config["document_token"] == 256
    found = [line for line in metrics(folder / "run") if "val_loss" in line]
    assert [line["step"] for line in found] == [2, 4]
    documents = 1 / (len(LINES) - 1)  # end-of-text tokens, which spell no byte, for each token
    for line in found:
        bits = line["val_loss"] / math.log(2)
        assert bits < line["bits_per_byte"] < bits * (1 + 2 * documents)
        assert line["sample"].startswith("<|endoftext|>the cat") and " | " in line["sample"]
    assert found[0]["sample"] != found[1]["sample"] or found[0]["val_loss"] == found[1]["val_loss"]
    out = capsys.readouterr().out
    assert "bits_per_byte:" in out and out.endswith("next:             python sample.py run\n")
    assert exit_code(sample, "run", "--prompt", "the", "--max-new-tokens", 5, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert out.startswith("the") and "weights of step 4" in err and "bytes, named in shards" in err


def test_without_its_tokenizer_the_sample_says_why(folder, monkeypatch):
    monkeypatch.setattr(decode, "tokenizer_at_hand", decode.tokenizer_at_hand.__wrapped__)  # remembers nothing
    monkeypatch.setattr(decode, "load_tokenizer", Mock(side_effect=UserError("bytes: cannot be downloaded")))
    assert run(*TRAIN, "--max-steps", "1") == 0
    last = metrics(folder / "run")[-1]
    assert last["sample"] == "none: bytes: cannot be downloaded" and "bits_per_byte" not in last


def test_the_benchmark_gives_a_row_for_a_model(folder):
    row = text.one(folder, folder / "shards", "attention", seed=0, minutes=0.01)
    assert row["steps"] >= 1 and row["val_loss"] / math.log(2) < row["bits_per_byte"] and row["parameters"] > 500_000
    assert {"model": "attention", "seed": 0, "flags": text.MODELS["attention"]}.items() <= row.items()


def test_a_folder_that_is_not_what_meta_json_says_is_refused(folder, capsys):
    shard = next((folder / "shards").glob("*train*.npy"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert run(*TRAIN, "--max-steps", "1") == 2
    assert "bytes that meta.json names" in capsys.readouterr().err and not (folder / "run").exists()
