"""Our model beside what people use today, at equal parameters, in one run: training, prefill, decoding, memory.

    python bench/peers.py                                   # about ten minutes on two cores; needs requirements-dev.txt
    python bench/peers.py --lengths 512 1024 4096 16384 --rounds 5
    python bench/peers.py --device cuda --lengths 1024 4096 --tokens 65536

Every figure is measured in a process of its own, the models in turn, round after round; printed are medians and
ratios to the first model. One training step is forward, backward and a fused AdamW step on random tokens of 512 kinds.
`share` is 6 x parameters x tokens a second over the machine's own measured matrix-product speed.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB, WIDTH, LAYERS, HEADS = 512, 256, 8, 4
OURS = {"hybrid": "MMAMMMAM", "attention": "AAAAAAAA", "mamba": "MMMMMMMM"}
MODELS = (*OURS, "gpt2", "granite-64", "granite-256")  # granite's chunk: its best on a CPU, its default


def gpt2(length: int):
    """transformers' GPT-2, the yardstick for the number of parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_positions=length, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa")
    return GPT2LMHeadModel(config)


def granite(cfg, chunk: int):
    """transformers' GraniteMoeHybrid in the sizes of our model `cfg`."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    kinds = ["attention" if letter == "A" else "mamba" for letter in cfg.pattern]
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, layer_types=kinds, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, shared_intermediate_size=cfg.d_ff, num_local_experts=0, mamba_n_heads=8,
        mamba_d_head=64, mamba_d_state=64, mamba_expand=2, mamba_n_groups=1, mamba_chunk_size=chunk,
        position_embedding_type="rope", attention_multiplier=(WIDTH // HEADS) ** -0.5, tie_word_embeddings=True,
        pad_token_id=None, attn_implementation="sdpa"))


def count(model) -> int:
    """Parameters, positions left out (GPT-2's table grows with the length)."""
    return sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)


def build(name: str, length: int):
    """A model and the d_ff that gives ours as many parameters as GPT-2 (within half a percent)."""
    import train

    if name == "gpt2":
        return gpt2(length)
    pattern = OURS.get(name, OURS["hybrid"])
    target = count(gpt2(8))

    def ours(d_ff: int):
        return train.GPT(train.ModelConfig(vocab_size=VOCAB, block_size=length, d_model=WIDTH, pattern=pattern,
                                           n_head=HEADS, d_state=64, headdim=64, d_ff=d_ff))

    per = count(ours(9)) - count(ours(8))
    d_ff = round(((target - count(ours(8))) / per + 8) / 8) * 8
    model = ours(d_ff)
    return granite(model.config, int(name.split("-")[1])) if name.startswith("granite") else model


def clock(work, times: int, device: str) -> list[float]:
    """Seconds of each call but the first, which warms up."""
    import torch

    spans = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - began)
    return spans[1:]


def matmul_speed(device: str) -> float:
    """Floating-point operations a second of one large matrix product, the best of ten."""
    import torch

    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(clock(lambda: a @ a, 10, device))


def measure(name: str, length: int, tokens: int, device: str, steps: int, decode: int) -> dict[str, float]:
    """The figures of one model at one length, in this process."""
    import torch
    import torch.nn.functional as F

    import train

    torch.manual_seed(0)
    model = build(name, length).to(device)
    mine = isinstance(model, train.GPT)
    if mine and device == "cuda":
        train.load_triton().use(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randint(0, VOCAB, (max(1, tokens // length), length), device=device)
    cast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    def logits(tokens, **more):
        return model(tokens)[0] if mine else model(tokens, **more).logits

    def step():
        with cast:
            F.cross_entropy(logits(x, use_cache=False).flatten(0, 1).float(), x.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {"parameters": count(model), "training": x.numel() / statistics.median(clock(step, steps, device))}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["peak_gb"] = (torch.cuda.max_memory_allocated() if device == "cuda" else host) / 1e9
    model.eval()
    with torch.no_grad(), cast:
        found["prefill"] = x.numel() / statistics.median(clock(lambda: logits(x, use_cache=False), 2, device))

        prompt = x[:1, : length - decode - 1]  # GPT-2 has no positions behind its context

        def continued(n: int) -> None:
            if mine:
                model.generate(prompt, max_new_tokens=n)
            else:
                model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

        if decode:
            spans = [statistics.median(clock(lambda n=n: continued(n), 2, device)) for n in (1, decode + 1)]
            found["decoding"] = decode / (spans[1] - spans[0])
    found["peak_flops"] = matmul_speed(device)
    found["share"] = 6 * found["parameters"] * found["training"] / found["peak_flops"]
    return found


def main() -> None:
    """Measure every model in a process of its own, in turn, print the medians, keep them in bench/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], help="context lengths, in tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step, at least one sequence")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each model and length")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode behind a whole context; 0: none")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.tokens, args.device, args.steps, args.decode)))
        return
    import torch
    import transformers

    rest = ["--tokens", args.tokens, "--steps", args.steps, "--decode", args.decode, "--device", args.device]
    rows = []
    for length in args.lengths:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.models}
        for _ in range(args.rounds):
            for name in args.models:
                done = subprocess.run([sys.executable, __file__, "--one", name, str(length), *map(str, rest)],
                                      capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"peers.py: {name} at {length} failed:\n{done.stderr[-2000:]}")
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        for name in args.models:
            row = {key: statistics.median(r[key] for r in runs[name]) for key in runs[name][0]}
            rows.append({"model": name, "length": length, **row})
            first = next(r for r in rows if r["length"] == length)["training"]
            print(f"T {length:>6}  {name:<12} {row['parameters']:>10,.0f} parameters  {row['training']:>9,.0f} "
                  f"tokens/s training ({args.models[0]} is {first / row['training']:.2f} x)  {row['peak_gb']:.2f} GB  "
                  f"{row['prefill']:>9,.0f} prefill  {row.get('decoding', float('nan')):>7.1f} decoding  "
                  f"share {row['share']:.0%}", flush=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = git.stdout.strip()
    out = ROOT / "bench" / "results" / f"{date.today()}-peers-{args.device}.json"
    out.parent.mkdir(exist_ok=True)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__,
                               "commit": commit, "command": "python " + " ".join(sys.argv), "rows": rows}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
