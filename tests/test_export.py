"""An export is the same model to transformers' GraniteMoeHybrid, an independent implementation of the whole text model:
logits, loss, gradients, greedy tokens and tokenizer, loaded from the files alone."""

import functools
import json
import os
import random
import runpy
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import upstream
from helpers import CPU, complaint, exit_code, one_thread  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from test_sample import END, make_run

import sample
import train
from data.files import UserError
from data.shards import load_tokenizer
from tools import export

for name in ("safetensors", "tokenizers"):
    pytest.importorskip(name, reason=f"needs {name} (pip install -r requirements-dev.txt, Python >= 3.11)")

FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]
TEXTS = [*export.VARIED, "", " ", "\n\n\n", "can't WON'T 'tis I'll", "a\tb \t c", "x = {'a': [1, 22, 333]}", "ﬁ ǆ ß İ",
         "🏳️‍🌈🧑🏽‍🚀", "0123456789" * 3, "   indented\n     more   "]
WORDS = ["re", "in", " t", "thé", "there", "other", " there", " then", "'s", "e'll", " interest", "\n\n"]

TABLES = train.PLAIN, train.pick_ops(CPU, torch.float32, "auto")

command = functools.partial(exit_code, export)
refused = functools.partial(complaint, export)


def exported(folder: Path, **changes):
    """A run, exported to `out`, and its model."""
    ours = make_run(folder / "run", **changes)
    assert command(folder / "run", "--to", "hf", folder / "out") == 0
    return ours


def loaded(folder: Path):
    """What transformers makes of it."""
    upstream.granite()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shape", [
    {"pattern": "MMAM", "d_model": 48, "n_head": 4, "headdim": 8, "d_state": 12, "d_ff": 40, "chunk_size": 16},
    {"pattern": "AA", "headdim": 20},  # divides nothing: without Mamba it need not
    {"pattern": "MM", "n_head": 40, "tie_embeddings": False},  # more than there are channels: no matter without "A"
    {"pattern": "MA", "norm_eps": 1e-3, "rope_theta": 500.0, "d_conv": 3, "expand": 4, "tie_embeddings": False},
], ids=lambda shape: " ".join(map(str, shape.values())))  # fmt: skip
@torch.no_grad()
def test_transformers_loads_it_and_goes_on_alike(tmp_path, shape):
    """The same logits, and the same 64 greedy tokens by their own decoding, with a cache where they can."""
    ours, theirs = exported(tmp_path, average=True, **shape), loaded(tmp_path / "out")
    assert type(theirs).__name__ == "GraniteMoeHybridForCausalLM" and theirs.dtype == torch.float32
    assert theirs.config.tie_word_embeddings == ours.config.tie_embeddings
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    for length in (1, 64, 100):
        tokens = torch.randint(END, (2, length), generator=torch.Generator().manual_seed(0))
        expected = theirs(tokens).logits
        assert expected.std() > 0.3, "logits at a scale where 1e-4 means something"
        for ops in TABLES:
            ours.use(ops)
            logits, loss = ours(tokens)
            assert loss is None and (logits - expected).abs().max() <= 1e-4
            assert upstream.relative_error(logits, expected) <= 1e-5
    prompt = tokens[:, :9]
    new, _ = train.generate(ours, prompt, torch.tensor([9, 9]), 64, choose=sample.chooser(END + 1, 0, 0, 1, 0))
    theirs.generation_config.eos_token_id = None  # a random model may end its text early
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    assert torch.equal(continued[:, 9:], new)


def test_loss_and_gradients_are_those_of_transformers(tmp_path):
    """Targets are the next tokens, some without loss; theirs shifts by itself. Gradients are compared by our names."""
    ours, theirs = exported(tmp_path, pattern="MMAM"), loaded(tmp_path / "out")
    tokens = torch.randint(END, (2, 100), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 20:40] = labels[1, 90:] = -100
    expected = theirs(tokens, labels=labels).loss
    expected.backward()
    theirs_by_name = dict(theirs.named_parameters(remove_duplicate=False))
    for ops in TABLES:
        ours.use(ops)
        ours.zero_grad()
        _, loss = ours(tokens[:, :-1], labels[:, 1:])
        assert (loss - expected).abs() <= 1e-5
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        gradients["head.weight"] = gradients["embed.weight"]  # tied
        for name, gradient in export.hf_weights(gradients, "MMAM").items():
            assert upstream.relative_error(gradient, theirs_by_name[name].grad) <= 1e-4, name


@torch.no_grad()
def test_padded_vocabulary_without_tokenizer_at_hand(tmp_path, capsys, monkeypatch):
    """50,304 rows for GPT-2's 50,257 tokens; the vocabulary is left out with a word where it cannot be had."""
    monkeypatch.setattr(export, "load_tokenizer", Mock(side_effect=UserError("no vocabulary here")))
    ours = exported(tmp_path, tokenizer="gpt2", vocab_size=50304)
    assert "left out: no vocabulary here\n" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == FILES[:4]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gpt2's, not in this folder" in card and "not measured" in card and "one document at a time" not in card
    theirs = loaded(tmp_path / "out")
    assert theirs.config.eos_token_id == 50256 and theirs.get_input_embeddings().weight.shape[0] == 50304
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    tokens = torch.randint(50257, (1, 40), generator=torch.Generator().manual_seed(0))
    assert (ours(tokens)[0] - theirs(tokens).logits).abs().max() <= 1e-4
    theirs.lm_head.weight[50257:] = 100 * theirs.lm_head.weight[0]  # padding would be the likeliest by far
    assert theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5).max() < 50257


def test_files_in_a_folder_of_any_name_without_transformers(tmp_path, monkeypatch):
    """Readable to others, in names that readers of the older layout know too."""
    from safetensors import safe_open

    make_run(tmp_path / "run", "MMAM", document_token=END)
    lines = ['{"step": 1, "loss": 9.0}', '{"step": 5, "val_loss": 4.5}', '{"step": 7, "val_loss": 4.25}', '{"step": 8,']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    out = tmp_path / "deep" / (os.fsdecode(b"\xff\xfe") if sys.platform == "linux" else "out")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # cannot be imported
        assert runpy.run_path(export.__file__)["main"]([str(tmp_path / "run"), "--to", "hf", str(out)]) == 0
    assert os.listdir(out.parent) == [out.name] and sorted(os.listdir(out)) == FILES
    assert len({(out / name).stat().st_mode for name in FILES}) == 1
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["mamba", "mamba", "attention", "mamba"]
    (out / "model.safetensors").rename(weights := tmp_path / "weights")  # safetensors takes no such folder's name
    with safe_open(weights, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys() and "model.embed_tokens.weight" in file.keys()
    card = (out / "README.md").read_text()
    assert "weights of step 7" in card and "MMAM" in card and "one document at a time" in card
    assert "| last validation loss | 4.250 nats per token |" in card


@functools.cache
def small_vocabulary(pattern: str | None = None):
    """A tiktoken vocabulary of a few words and all their beginnings, split as GPT-2 does or as `pattern` says."""
    import tiktoken

    ranks = {bytes([b]): i for i, b in enumerate(random.Random(0).sample(range(256), 256))}
    for word in WORDS:
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("small", pat_str=pattern or gpt2, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


exported_vocabulary = functools.cache(lambda: export.hf_tokenizer(small_vocabulary()))


@given(st.text() | st.sampled_from(TEXTS) | st.lists(st.sampled_from(WORDS)).map("".join))
def test_tokenizer_gives_the_same_ids(text):
    assert exported_vocabulary().encode(text).ids == small_vocabulary().encode_ordinary(text)


def test_tokenizer_joins_bytes_and_knows_where_documents_begin():
    ours, encoding = exported_vocabulary(), small_vocabulary()
    assert len(ours.encode(" there then").ids) < 5
    assert ours.encode("a<|endoftext|>b").ids == encoding.encode("a<|endoftext|>b", allowed_special="all")
    assert ours.get_vocab_size() == encoding.n_vocab
    with pytest.raises(UserError, match="small"):  # one that splits otherwise
        export.hf_tokenizer(small_vocabulary(pattern=r"\s*\S+|\s+"))


def test_exported_tokenizer_and_pipeline(tmp_path, capsys):
    """AutoTokenizer reads the files; text in, text out, equal to sample.py."""
    upstream.granite()
    from transformers import AutoTokenizer, pipeline

    exported(tmp_path)
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer("bytes")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == encoding.encode_ordinary(text)
        assert tokenizer.decode(encoding.encode_ordinary(text)) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END and tokenizer.model_max_length == 512
    both = tokenizer(["To be", "a"], padding=True)  # the shorter prompt ends where the longer one does
    assert both["input_ids"][1] == [END] * 4 + [ord("a")] and both["attention_mask"][1] == [0, 0, 0, 0, 1]
    said = pipeline("text-generation", str(tmp_path / "out"), max_new_tokens=20, do_sample=False)("To be")
    capsys.readouterr()
    flags = "--prompt,To be,--temperature,0,--max-new-tokens,20,--device,cpu".split(",")
    assert exit_code(sample, tmp_path / "run", *flags) == 0
    assert capsys.readouterr().out == said[0]["generated_text"] + "\n"


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs TIKTOKEN_CACHE_DIR with GPT-2's vocabulary")
def test_the_real_vocabulary():
    """Every token of GPT-2, this repository's files and texts of many kinds: the same ids."""
    encoding = load_tokenizer("gpt2")
    ours = export.hf_tokenizer(encoding)
    assert encoding.encode_ordinary("Hello world") == [15496, 995] and ours.get_vocab_size() == 50257
    files = [f.read_text(encoding="utf-8") for f in Path(train.HERE).glob("**/*.py")]
    words = [encoding.decode([i]) for i in range(50256)]
    for text in [*TEXTS, *files, *words, "".join(words)]:
        assert ours.encode(text).ids == encoding.encode(text, allowed_special="all"), text[:100]


def test_refusals(tmp_path, capsys, monkeypatch):
    """No text run, an existing folder, a place that is none, missing packages: one line, nothing written."""
    run, out, full = (tmp_path / name for name in ("run", "out", "full"))
    make_run(run)
    full.mkdir()
    (full / "kept").write_text("mine")
    assert "none: no run there" in refused(capsys, tmp_path / "none", "--to", "hf", out)
    assert "full exists" in refused(capsys, run, "--to", "hf", full)
    assert "config.json" in refused(capsys, run, "--to", "hf", run / "config.json" / "out")
    for name in ("safetensors", "tokenizers"):
        monkeypatch.setattr(export.importlib.util, "find_spec", lambda asked, name=name: None if asked == name else sys)
        assert f"needs {name}: pip install" in refused(capsys, run, "--to", "hf", out)
    assert os.listdir(full) == ["kept"] and sorted(os.listdir(tmp_path)) == ["full", "run"]


def test_nothing_is_left_of_an_export_that_was_stopped(tmp_path, capsys, monkeypatch):
    """And what a killed one left does not stop the next."""
    make_run(tmp_path / "run")
    argv = tmp_path / "run", "--to", "hf", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(export, "hf_tokenizer", Mock(side_effect=KeyboardInterrupt))
        assert command(*argv) == 130
    assert capsys.readouterr() == ("", "export.py: stopped\n") and os.listdir(tmp_path) == ["run"]
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "model.safetensors").write_bytes(b"half")
    assert command(*argv) == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "run"] and sorted(os.listdir(tmp_path / "out")) == FILES
