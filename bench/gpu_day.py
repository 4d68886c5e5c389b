"""One measurement of bench/gpu_day.sh: a line of JSON, added to a file.

    python bench/gpu_day.py parity results.jsonl
    python bench/gpu_day.py small 16 results.jsonl        # train.py's model, or "gpt2", "hf-gpt2", "hf-granite"
    python bench/gpu_day.py gpt2 2 8 32 results.jsonl     # one batch size after another

SMOKE=1: nano sizes, on whatever device there is. Tokens are random; those of ARC are tasks, packed into rows.
"""
from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402

SMOKE = os.environ.get("SMOKE") == "1"
# Dense bf16 products with fp32 sums, operations per second, by the makers' data sheets; the first that fits counts.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "L40": 181e12, "L4": 121e12, "4090": 165e12}


def setup(dataset: str, preset: str) -> tuple[train.ModelConfig, train.TrainConfig, train.Runtime]:
    """A preset, and kernels, as training would have them."""
    given = dict(dataset=dataset, preset="nano" if SMOKE else preset)
    model_cfg, cfg = train.make_config(given, torch.cuda.is_available())
    if dataset == "arc":
        model_cfg.n_tasks, model_cfg.document_token = 800, train.UNKNOWN_TASK
    return model_cfg, cfg, train.Runtime.start(cfg)


def packed(b: int, t: int) -> tuple[Tensor, Tensor]:
    """Tasks of four random pairs, end to end, cut into b rows of t tokens, and the tokens that come next."""
    rng, tokens = np.random.default_rng(0), np.empty(0, dtype=np.int64)
    while len(tokens) <= b * t:
        grids = [rng.integers(0, 10, rng.integers(2, 13, 2)).astype(np.uint8) for _ in range(8)]
        pairs = list(zip(grids[::2], grids[1::2], strict=True))
        tokens = np.append(tokens, train.encode_pairs(pairs, train.UNKNOWN_TASK + int(rng.integers(0, 800)))[0])
    x, y = (torch.from_numpy(v[: b * t].copy()).view(b, t) for v in (tokens[:-1], tokens[1:]))
    x[:, 0] = train.UNKNOWN_TASK
    return x, y.masked_fill(y >= train.UNKNOWN_TASK, train.IGNORE_INDEX)


def parity() -> dict:
    """Loss and gradients of a packed model, as trained on this device, against the plain one in float32 on the CPU."""
    model_cfg, cfg, runtime = setup("arc", "small")
    model_cfg.pattern = "MAMA"
    model = train.GPT(model_cfg)
    nn.init.normal_(model.film.weight, std=0.02)
    x, y = packed(2, 256 if SMOKE else 1024)
    found = []
    for device, ops in ((torch.device("cpu"), train.PLAIN), (runtime.device, runtime.ops)):
        model.to(device).use(ops)
        model.zero_grad()
        with runtime.autocast() if len(found) else torch.autocast("cpu", enabled=False):
            loss = model(x.to(device), y.to(device))[1]
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])))
    (loss, gradient), (ours, our_gradient) = found
    errors = abs(ours / loss - 1), ((our_gradient - gradient).norm() / gradient.norm()).item()
    return dict(loss=loss, loss_error=errors[0], gradient_error=errors[1],
                ok=errors[0] < 1e-3 and errors[1] < 0.03)


def theirs(name: str, cfg: train.ModelConfig) -> nn.Module:
    """A model of transformers, in the sizes of ours."""
    import transformers as hf

    if name == "hf-gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.d_model, n_layer=len(cfg.pattern),
            n_head=cfg.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    kinds = ["attention" if letter == "A" else "mamba" for letter in cfg.pattern]
    return hf.GraniteMoeHybridForCausalLM(hf.GraniteMoeHybridConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, num_hidden_layers=len(kinds), layer_types=kinds,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_head, shared_intermediate_size=cfg.d_ff,
        num_local_experts=0, mamba_n_heads=2 * cfg.d_model // cfg.headdim, mamba_d_head=cfg.headdim,
        mamba_d_state=cfg.d_state, mamba_expand=2, mamba_n_groups=1, position_embedding_type="rope",
        attention_multiplier=(cfg.d_model // cfg.n_head) ** -0.5, tie_word_embeddings=True, pad_token_id=None))


def stepper(name: str, b: int) -> tuple[nn.Module, Callable[[], None], int, train.ModelConfig]:
    """A model, what does one training step of it, and the tokens of a step."""
    model_cfg, cfg, runtime = setup("arc", "small") if name == "small" else setup("fineweb", "gpt2")
    t = 256 if SMOKE else model_cfg.block_size
    if name == "small":
        x, y = packed(b, t)
    else:
        x = torch.randint(0, model_cfg.vocab_size, (b, t), generator=torch.Generator().manual_seed(0))
        y = x.roll(-1, 1)
    if not name.startswith("hf-"):
        model = train.build_model(model_cfg, cfg, runtime)
        given = train.Optimizers(model, cfg), [(x, y)], 1e-3, cfg, runtime
        return model, functools.partial(train.optimizer_step, model, *given), x.numel(), model_cfg
    model, x = theirs(name, model_cfg).to(runtime.device), x.to(runtime.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with runtime.autocast():
            loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return model, step, x.numel(), model_cfg


def speed(name: str, b: int) -> Iterator[dict]:
    """Tokens per second and peak memory of training steps.

    MFU counts products with parameters, but not what is looked up, and in text causal attention.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, step, tokens, cfg = stepper(name, b)
    for _ in range(4):
        step()
    times, began = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < (1 if SMOKE else 4):
        start = time.perf_counter()
        step()  # ends by reading the loss, so the device is done
        times.append(time.perf_counter() - start)
    rate = tokens / float(np.median(times))
    inner = sum(p.numel() for name, m in model.named_modules() for p in m.parameters(recurse=False)
                if not isinstance(m, nn.Embedding) and name not in ("embed_near", "film"))
    layers = len(cfg.pattern) if name == "hf-gpt2" else cfg.pattern.count("A")
    flops = 6 * inner + (0 if cfg.grid else 6 * layers * cfg.d_model * cfg.block_size)  # attention: causal, so half
    peak = next((v for k, v in PEAK.items() if cuda and k in torch.cuda.get_device_name()), None)
    yield dict(batch=b, tokens_per_second=round(rate), steps=len(times), parameters=inner,
               mfu=peak and flops * rate / peak, peak_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None)
    if name == "small":
        show_profile(step)


def show_profile(step: Callable[[], None]) -> None:
    """Print where three steps spend their time: kernels, and operators of the host."""
    with torch.profiler.profile() as found:
        for _ in range(3):
            step()
    for key in ("self_device_time_total", "device_time_total", "self_cpu_time_total"):
        print(found.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90))


def main(name: str, *more: str) -> int:
    """0, or 1 where parity does not hold."""
    *sizes, out = more
    cuda = torch.cuda.is_available()
    where = dict(kernels=train.pick_ops(torch.device("cuda" if cuda else "cpu"), torch.float32, "auto").name,
                 device=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__,
                 commit=os.environ.get("GIT_COMMIT"))
    good = True
    for result in [parity()] if name == "parity" else itertools.chain(*(speed(name, int(b)) for b in sizes)):
        line = json.dumps(dict(name=name, **result, **where))
        print(line, flush=True)
        good = good and result.get("ok", True)
        with open(out, "a", encoding="utf-8") as file:
            print(line, file=file)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
