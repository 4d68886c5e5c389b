"""Write a text model that train.py made in the layout of another library.

    python tools/export.py runs/fineweb --to hf exported/fineweb
    python -c "from transformers import pipeline; print(pipeline('text-generation', 'exported/fineweb')('The'))"

`hf` is transformers' GraniteMoeHybrid without experts, which is the same architecture: tensors are renamed, nothing is
computed. The folder holds config.json, generation_config.json, model.safetensors, README.md and, if the vocabulary can
be had, tokenizer.json and tokenizer_config.json. It appears when it is complete. Writing it needs `safetensors` and
`tokenizers`, but not transformers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.files import UserError, read_text, run_script, write_json
from data.flags import Parser
from data.shards import TOKENIZERS, load_tokenizer
from extras.runs import load_model
from sample import add_tokenizer, choose_tokenizer, described, text_settings
from train import GPT, ModelConfig

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tokenizers import Tokenizer

MAMBA = ("dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight")
LAYER_TYPES = {"M": "mamba", "A": "attention"}  # transformers from 5.16 on calls them otherwise, and reads both
VARIED = (  # a tokenizer that splits any of this otherwise is not written
    "It's 3.14 o'clock, we'll see. I'VE  two  spaces \t\ttabs\n\n    def f(x): return x**2  # 100%\r\n",
    " Größe naïve Москва 東京 مرحبا שלום हिन्दी 한국어 👩\u200d👩\u200d👧 e\u0301 ½ Ⅷ ١٢٣",
    "\u00a0\u3000 \u2028 a\u0000b\ufffd   ",
)


# == GRANITEMOEHYBRID =================================================================================================


def hf_config(cfg: ModelConfig, end_of_text: int | None = None) -> dict[str, Any]:
    """Our settings as GraniteMoeHybrid's config.json, whose defaults are other ones, such as eight experts.

    A pattern without Mamba, or without attention, leaves that part's head sizes open; one head is always valid.
    """
    inner, attends = cfg.expand * cfg.d_model, "A" in cfg.pattern
    heads, mamba_heads = cfg.n_head if attends else 1, inner // cfg.headdim if "M" in cfg.pattern else 1
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.block_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": len(cfg.pattern),
        "layer_types": [LAYER_TYPES[letter] for letter in cfg.pattern],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": (cfg.d_model // heads) ** -0.5,
        "position_embedding_type": "rope",
        "rope_theta": cfg.rope_theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "mamba_n_heads": mamba_heads,
        "mamba_d_head": inner // mamba_heads,
        "mamba_n_groups": 1,
        "mamba_d_state": cfg.d_state,
        "mamba_d_conv": cfg.d_conv,
        "mamba_expand": cfg.expand,
        "mamba_chunk_size": cfg.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "intermediate_size": cfg.d_ff,
        "shared_intermediate_size": cfg.d_ff,
        "hidden_act": "silu",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "rms_norm_eps": cfg.norm_eps,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "use_cache": attends,  # transformers 5.23 counts the tokens of its cache in attention layers only
        "dtype": "float32",
    }


def hf_weights(weights: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Our tensors under GraniteMoeHybrid's names; the fused qkv becomes three, as views."""
    renamed = {
        "model.embed_tokens.weight": weights["embed.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["head.weight"],
    }
    for i, letter in enumerate(pattern):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        renamed[theirs + "input_layernorm.weight"] = weights[ours + "norm1.weight"]
        renamed[theirs + "post_attention_layernorm.weight"] = weights[ours + "norm2.weight"]
        renamed[theirs + "shared_mlp.input_linear.weight"] = weights[ours + "mlp.up.weight"]
        renamed[theirs + "shared_mlp.output_linear.weight"] = weights[ours + "mlp.down.weight"]
        if letter == "M":
            renamed |= {f"{theirs}mamba.{name}": weights[f"{ours}mixer.{name}"] for name in MAMBA}
        else:
            for name, rows in zip("qkv", weights[ours + "mixer.qkv.weight"].chunk(3), strict=True):
                renamed[f"{theirs}self_attn.{name}_proj.weight"] = rows
            renamed[theirs + "self_attn.o_proj.weight"] = weights[ours + "mixer.out_proj.weight"]
    return renamed


# == TOKENIZER ========================================================================================================


def split_once(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that tiktoken joins last when it makes `token`: joins of lower rank, the lowest first, until none."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        first = min(joined)
        if first >= ranks[token]:
            break
        i = joined.index(first)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hf_tokenizer(encoding: Encoding) -> Tokenizer:
    """A tiktoken vocabulary with GPT-2's way of splitting text, as a tokenizer of `tokenizers`, with the same ids.

    Raises UserError if it gives other ids on texts of many kinds.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    shown = [b for b in range(256) if chr(b).isprintable() and b != 32]  # GPT-2 writes these bytes as they are
    letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(shown)))}
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    merges = [split_once(token, ranks) for token in ranks if len(token) > 1]  # in order of rank
    spelled = {token: "".join(letter[b] for b in token) for token in ranks}
    found = Tokenizer(models.BPE(vocab={spelled[token]: i for token, i in ranks.items()},
                                 merges=[(spelled[a], spelled[b]) for a, b in merges]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(encoding.decode([encoding.eot_token]), special=True, normalized=False)])
    for text in VARIED:
        ids = encoding.encode_ordinary(text)
        if found.encode(text).ids != ids or found.decode(ids) != text:
            raise UserError(f"the tokenizer {encoding.name} is not what `tokenizers` makes of it on {text[:20]!r}")
    return found


# == THE FOLDER =======================================================================================================


def model_card(out: Path, model: GPT, about: str, losses: list[float], tokenizer: str) -> str:
    """README.md of an export: what the model is and how to run it. Nothing here says that it is any good."""
    size, c = sum(p.numel() for p in model.parameters()), model.config
    alone = " In training each saw only itself: give one document at a time." if c.document_token >= 0 else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {out.name}

A language model of {size:,} parameters, trained from scratch: `{c.pattern}`, one letter per layer, M for Mamba-2 and A
for attention. Stored as GraniteMoeHybrid without experts, in float32.

| | |
|---|---|
| weights | {about.split("; ")[-1]} |
| last validation loss | {f"{losses[-1]:.3f} nats per token" if losses else "not measured"} |
| width, SwiGLU | {c.d_model}, {c.d_ff} |
| Mamba-2 | headdim {c.headdim}, d_state {c.d_state} |
| attention | {c.n_head} heads, rotary positions, theta {c.rope_theta:g} |
| vocabulary | {c.vocab_size}, {"tied" if c.tie_embeddings else "untied"}; rows that the tokenizer lacks are padding |
| tokenizer | {tokenizer} |
| trained on sequences of | {c.block_size} tokens |

It continues text: it was not taught to follow instructions, and nothing was done to keep what it says true or harmless.
Its licence, and that of the data behind it, are for whoever trained it to state.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out.as_posix()}")
tokenizer = AutoTokenizer.from_pretrained("{out.as_posix()}")
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50)[0]))
```

A document begins with `<|endoftext|>`.{alone}
"""


def validation_losses(folder: Path) -> list[float]:
    """Those that the run logged, in order."""
    path, found = folder / "metrics.jsonl", []
    for line in read_text(path, "replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(KeyError, TypeError, ValueError):  # a line without one, or torn by a crash
            found.append(float(json.loads(line)["val_loss"]))
    return found


def write_hf(folder: Path, model: GPT, vocabulary: int, encoding: Encoding | None, card: str) -> None:
    """Every file of the layout, into an empty folder. The last of `vocabulary` tokens is end-of-text."""
    from safetensors.torch import save

    cfg, end = model.config, vocabulary - 1
    weights = hf_weights(model.state_dict(), cfg.pattern)
    if cfg.tie_embeddings:
        del weights["lm_head.weight"]
    tensors = {name: w.clone() for name, w in weights.items()}  # no two share memory
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))  # save_file's is for its owner only
    write_json(folder / "config.json", hf_config(cfg, end))
    generation: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
                                  "use_cache": "A" in cfg.pattern}
    if vocabulary < cfg.vocab_size:
        generation["suppress_tokens"] = list(range(vocabulary, cfg.vocab_size))
    write_json(folder / "generation_config.json", generation)
    if encoding:
        text = encoding.decode([end])
        (folder / "tokenizer.json").write_text(hf_tokenizer(encoding).to_str(), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": cfg.block_size, "bos_token": text,
            "eos_token": text, "pad_token": text, "padding_side": "left",  # a continuation follows its prompt at once
            "clean_up_tokenization_spaces": False})
    (folder / "README.md").write_bytes(card.encode("utf-8", "replace"))  # a folder's name may be no text


@contextlib.contextmanager
def new_folder(out: Path):
    """An empty folder beside `out` that takes its name on leaving, once all its files are on the disk."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# == COMMAND LINE =====================================================================================================


def export(run: Path, out: Path, tokenizer: str | None) -> None:
    """Write the model of a text run to a new folder, `out`."""
    for package in ("safetensors", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"needs {package}: pip install safetensors tokenizers")
    model_cfg, cfg = text_settings(run)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; name another folder, or remove it first")
    name, which = choose_tokenizer(tokenizer, model_cfg, cfg)
    encoding = None
    try:
        encoding = load_tokenizer(name)
    except UserError as error:
        which += f"; left out: {error}"
    model, state = load_model(run, model_cfg)
    about = described(model, state)
    card = model_card(out, model, about, validation_losses(run), name if encoding else f"{name}'s, not in this folder")
    with new_folder(out) as folder:
        write_hf(folder, model, TOKENIZERS[name], encoding, card)
    print(f"wrote       {out}: {about}\ntokenizer   {which}")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 2 with one line for each problem, 130 after Ctrl-C; nothing is left of what failed."""
    def work() -> None:
        parser = Parser(prog="tools/export.py",
                        description="Write a text model that train.py made in the layout of another library.")
        parser.add_argument("run", type=Path, help="the folder of a run, for example runs/fineweb")
        parser.add_argument("--to", choices=["hf"], required=True, help="hf: transformers' GraniteMoeHybrid")
        parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
        add_tokenizer(parser)
        args = parser.parse_args(argv)
        export(args.run, args.out, args.tokenizer)

    return run_script("export.py", work)


if __name__ == "__main__":
    sys.exit(main())
