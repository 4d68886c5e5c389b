"""Our model beside what people use today, at equal parameters, in one run: training, prefill, decoding, memory.

    python bench/peers.py                                   # 15 minutes on two cores; needs requirements-dev.txt
    python bench/peers.py --lengths 512 1024 4096 16384     # an hour; every measure of the table at the end
    python bench/peers.py --lengths 1024 16384 --models hybrid mamba gpt2 --rounds 1 --decode 0
    python bench/peers.py --device cuda --tokens 32768      # 124M parameters, bf16, mamba-ssm's kernels

Every figure is measured in a process of its own, the models in turn, round after round; printed are medians, ratios to
the first model and, last, the measures that this repository promises. Results, with a plot of time per token against
length, go to bench/results/.

A training step is forward with the model's own loss, backward and fused AdamW, on random tokens. Prefill and decoding
are of one sequence: tokens a second to the first new token, and between new tokens, behind a context of that length.
`share` is 6 x parameters x tokens a second over the machine's own measured speed of matrix products. MFU counts
attention too (6 x its layers x width x length a token, half a square because it is causal), over what the GPU's maker
promises or, where that is not known, over what was measured.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

# Dense bf16 products with fp32 sums, operations a second, by the makers' data sheets; the first name that fits counts.
NOMINAL = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
           "RTX 4090": 165.2e12, "RTX 5090": 209.5e12}
KINDS = ("hybrid", "attention", "mamba", "gpt2", "granite")
MODELS = ("hybrid", "attention", "mamba", "gpt2", "granite-64", "granite-256")  # granite's best chunk on a CPU, default


class Size(NamedTuple):
    """Sizes that all models share; d_ff follows from the number of parameters of GPT-2."""

    vocab: int
    width: int
    heads: int
    state: int  # Mamba-2's state size, and channels in a head
    pattern: str  # of the hybrid; the others have as many layers


SIZES = {"toy": Size(64, 64, 2, 16, "MA"), "small": Size(512, 256, 4, 64, "MMAMMMAM"),
         "gpt2": Size(50304, 768, 12, 64, "MMAMMMAMMMAM")}


# == the models =======================================================================================================


def choose_kernels(device: str) -> Any:
    """The runtime that train.py would have, and the same kernels for transformers; before its models are imported.

    On CUDA both use mamba-ssm's Triton kernels, upstream's fused one only where causal-conv1d is installed; elsewhere
    transformers gets none, because it would take those of an installed package whatever the device.
    """
    import train

    runtime = train.Runtime.start(train.TrainConfig(device=device, kernels="triton" if device == "cuda" else "torch"))
    if device != "cuda":
        sys.modules["mamba_ssm"] = sys.modules["causal_conv1d"] = None
    elif runtime.kernels.fused is None:
        from transformers.models.granitemoehybrid import modeling_granitemoehybrid as theirs

        theirs.mamba2_split_conv1d_scan_combined = lambda *args, **more: None  # as where no kernels are installed
    return runtime


def gpt2(size: Size, length: int):
    """transformers' GPT-2, the yardstick for the number of parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=size.vocab, n_positions=length, n_embd=size.width, n_layer=len(size.pattern), n_head=size.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa"))


def granite(cfg, chunk: int):
    """transformers' GraniteMoeHybrid in the sizes of our model `cfg`."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    kinds = ["attention" if letter == "A" else "mamba" for letter in cfg.pattern]
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, num_hidden_layers=len(kinds), layer_types=kinds,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_head, shared_intermediate_size=cfg.d_ff,
        num_local_experts=0, mamba_n_heads=2 * cfg.d_model // cfg.headdim, mamba_d_head=cfg.headdim,
        mamba_d_state=cfg.d_state, mamba_expand=2, mamba_n_groups=1, mamba_chunk_size=chunk,
        position_embedding_type="rope", attention_multiplier=(cfg.d_model // cfg.n_head) ** -0.5,
        tie_word_embeddings=True, pad_token_id=None, attn_implementation="sdpa"))


def count(model) -> int:
    """Parameters, positions left out (GPT-2's table grows with the length)."""
    return sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)


def build(name: str, size: Size, length: int):
    """A model as `name` says, perhaps with its chunk behind a hyphen, with as many parameters as GPT-2 of that size."""
    import torch

    import train

    kind, _, chunk = name.partition("-")
    if kind == "gpt2":
        return gpt2(size, length)
    pattern = {"attention": "A" * len(size.pattern), "mamba": "M" * len(size.pattern)}.get(kind, size.pattern)

    def config(d_ff: int):
        return train.ModelConfig(vocab_size=size.vocab, block_size=length, d_model=size.width, pattern=pattern,
                                 n_head=size.heads, d_state=size.state, headdim=size.state, d_ff=d_ff)

    with torch.device("meta"):
        target, least, next_ = count(gpt2(size, 8)), count(train.GPT(config(8))), count(train.GPT(config(16)))
    cfg = config(8 + 8 * round((target - least) / (next_ - least)))
    if kind == "granite":
        return granite(cfg, int(chunk or 256))
    cfg.chunk_size = int(chunk or cfg.chunk_size)
    return train.GPT(cfg)


def model_name(text: str) -> str:
    """A name of KINDS, perhaps with a chunk length behind a hyphen, for argparse."""
    kind, hyphen, chunk = text.partition("-")
    if kind not in KINDS or hyphen and (not chunk.isdecimal() or int(chunk) < 1 or kind in ("gpt2", "attention")):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(KINDS)}, nor one of those with Mamba layers "
                                         "with a chunk length, such as granite-64")
    return text


# == measuring, in a process of its own ===============================================================================


def wait(device: str) -> None:
    """Until the device has done all it was told to."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def clock(work: Any, times: int, device: str) -> list[float]:
    """Seconds of each of so many calls."""
    spans = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        spans.append(time.perf_counter() - began)
    return spans


def peak_memory(device: str) -> int:
    """The most bytes that were in use at once: tensors on CUDA, elsewhere the whole process."""
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # where getrusage counts what the parent had when it started this process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: str) -> None:
    """Begin anew, where the system can; the first step also tunes kernels, which takes memory of its own."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def matmul_speed(device: str) -> float:
    """Floating-point operations a second of one large matrix product, the best of ten."""
    import torch

    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(clock(lambda: a @ a, 11, device))


def nominal_speed(device: str) -> float | None:
    """What the GPU's maker promises, where NOMINAL has it."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((flops for known, flops in NOMINAL.items() if known in name and "Laptop" not in name), None)


def utilisation(parameters: int, attention: int, width: int, length: int, speed: float) -> dict[str, float]:
    """`operations` a second of a training at `speed` tokens a second, and its part for parameters alone.

    `attention` layers of `width` channels see `length` tokens, half of them on average.
    """
    return {"products": 6 * parameters * speed, "operations": (6 * parameters + 6 * attention * width * length) * speed}


class Stamps(list):
    """Times of new tokens; transformers' `generate` calls `put` with the prompt and then with each."""

    def put(self, tokens: Any) -> None:
        self.append(time.perf_counter())

    def end(self) -> None:
        pass


def continued(model, prompt, n: int, device: str) -> list[float]:
    """Times at which the prompt (B, T) was given and each of n more tokens was there."""
    import train

    stamps = Stamps()
    if isinstance(model, train.GPT):
        stamps.put(None)
        for _ in model.stream(prompt, max_new_tokens=n):
            wait(device)
            stamps.put(None)
    else:
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, streamer=stamps)
    return stamps


def decoding(model, prompt, n: int, device: str) -> dict[str, float]:
    """Tokens a second (of all rows together) up to the first of n new tokens, and between them. Warms up first."""
    import torch

    with torch.no_grad():
        stamps = [continued(model, prompt, n, device) for _ in range(2)][1]
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    found = {"prefill": prompt.numel() / steps[0]}
    return found | ({"decoding": len(prompt) / statistics.median(steps[1:])} if n > 1 else {})


def measure(model: str, length: int, size: list, tokens: int, device: str, steps: int, decode: int,
            compile: bool) -> dict[str, Any]:
    """The figures of one model at one length, in this process."""
    import torch

    import train

    runtime, size = choose_kernels(device), Size(*size)
    with torch.device("meta"):
        build(model, size, length)  # so that what it imports is not counted as the step's memory
    torch.manual_seed(0)
    before = peak_memory(device)
    network = build(model, size, length).to(runtime.device)
    mine = isinstance(network, train.GPT)
    runtime.kernels.use(network)
    called = train.wrap(network, train.TrainConfig(compile=compile), runtime) if mine else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    x = torch.randint(0, size.vocab, (max(1, tokens // length), length), device=runtime.device)
    y = torch.cat([x[:, 1:], torch.full_like(x[:, :1], train.IGNORE_INDEX)], dim=1)  # theirs shifts by itself

    def step() -> None:
        with runtime.autocast():
            loss = called(x, y)[1] if mine else network(x, labels=x, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    forget_peak(device)
    speed, parameters = x.numel() / statistics.median(clock(step, steps, device)), count(network)
    found = {"parameters": parameters, "kernels": runtime.kernels.text, "training": speed,
             "peak_gb": peak_memory(device) / 1e9, "step_gb": (peak_memory(device) - before) / 1e9}
    network.eval()
    if decode:
        n = min(decode, length // 2)  # GPT-2 has no positions behind its context
        with runtime.autocast():
            found |= decoding(network, x[:1, : length - n], n, device)
    found |= {"peak_flops": matmul_speed(device), "nominal_flops": nominal_speed(device)}
    attention = size.pattern.count("A") if model.startswith(("hybrid", "granite")) else len(size.pattern)
    done = utilisation(parameters, 0 if model.startswith("mamba") else attention, size.width, length, speed)
    return found | {"share": done["products"] / found["peak_flops"],
                    "mfu": done["operations"] / (found["nominal_flops"] or found["peak_flops"])}


# == what every script of this folder does with a measurement =========================================================


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see python bench/{self.prog} --help)\n")


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def alone(script: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What `script --one SPEC` prints in a process of its own; {"error": its last words} where it fails."""
    done = subprocess.run([sys.executable, script, "--one", json.dumps(spec)], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    words = [line for line in done.stderr.splitlines() if line.strip()] or [f"ended with status {done.returncode}"]
    return {"error": "killed: was memory short?" if done.returncode == -9 else words[-1][:200]}


def about(device: str) -> dict[str, Any]:
    """Where and with what a measurement was made."""
    import torch

    where = f"{os.cpu_count()} cores, {platform.machine()}"
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, {where}"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    commit = os.environ.get("GIT_COMMIT") or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"machine": where, "python": platform.python_version(), "torch": torch.__version__, "commit": commit,
            "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])}


def show(rows: list[list[str]]) -> str:
    """A table in Markdown, its first row the heading; columns of numbers stand right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    left = [not any(cells[1:]) or any(not cell[:1].isdigit() for cell in cells[1:] if cell) for cells in columns]
    lines = ["| " + " | ".join(cell.ljust(w) if flush else cell.rjust(w)
                               for cell, w, flush in zip(row, widths, left, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if flush else ":") for w, flush in zip(widths, left, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def results(name: str) -> Path:
    """The file that a measurement of today goes to unless told otherwise."""
    return ROOT / "bench" / "results" / f"{date.today()}-{name}.json"


def checked(device: str, out: Path) -> None:
    """ValueError where there is no such device, OSError where the results could not be written."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} sees none; use --device cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise OSError(f"--out {out}: no file can be written there")


def guarded(script: str, work: Any) -> int:
    """The exit code of work(): its own or 0; 2 after one line for bad input, 130 after Ctrl-C."""
    import train

    try:
        return work() or 0
    except (OSError, ValueError, train.ConfigError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        return 130


# == the results ======================================================================================================


class Measure(NamedTuple):
    """One promise: what was measured, or None, the least it must be and what is aimed at; of some, less is better."""

    text: str
    value: float | None
    least: float | None = None
    aim: float | None = None
    form: str = "{:.2f}x"
    lower: bool = False

    def row(self) -> list[str]:
        """Its row of the table."""
        least, aim, value = (self.form.format(v) if v is not None else "" for v in (self.least, self.aim, self.value))
        return [self.text, least, aim, value or "not run", self.verdict()]

    def verdict(self) -> str:
        """Where the value stands."""
        sign = -1 if self.lower else 1
        if self.value is None:
            return ""
        for limit, words in ((self.aim, "aim reached"), (self.least, "at least holds")):
            if limit is not None and sign * self.value >= sign * limit:
                return words
        return "" if self.least is None else "SHORT OF IT"


def measures(rows: list[dict[str, Any]], cuda: bool) -> list[Measure]:
    """The promises, from medians a model and length. Bounds are for two cores; on a GPU only MFU has an aim."""
    at = {(row["model"], row["length"]): row for row in rows if "training" in row}

    def get(model: str, length: int, key: str = "training") -> float | None:
        return at.get((model, length), {}).get(key)

    def best(length: int) -> str:
        chunks = [name for name, t in at if t == length and name.startswith("granite")]
        return max(chunks, key=lambda name: get(name, length), default="")

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    found = [Measure(f"training against GraniteMoeHybrid at its best chunk, T {t}",
                     ratio(get("hybrid", t), get(best(t), t)), 2.0, 3.0) for t in (1024, 4096)]
    found += [Measure(f"training against GPT-2, T {t}", ratio(get("hybrid", t), get("gpt2", t)), least, aim)
              for t, least, aim in ((1024, 1.1, 2.0), (4096, 1.5, 3.0), (16384, 3.0, 8.0))]
    found.append(Measure("share of the matmul peak, T 4096", get("hybrid", 4096, "share"), 0.27, 0.40, "{:.0%}"))
    memory = ratio(get("hybrid", 4096, "peak_gb"), get(best(4096), 4096, "peak_gb"))
    found.append(Measure("peak memory against GraniteMoeHybrid, T 4096", memory, 0.6, 0.4, lower=True))
    for model, least, aim in (("mamba", 1.3, 1.1), ("hybrid", None, None)):
        longer = ratio(get(model, 1024), get(model, 16384))
        found.append(Measure(f"time per token at 16384 over 1024, {model}", longer, least, aim, lower=True))
    slower = ratio(get("hybrid", 4096, "decoding"), get("hybrid", 512, "decoding"))
    found.append(Measure("decoding at context 4096 over 512, hybrid", slower, 0.8, 0.95))
    if cuda:
        found = [m._replace(least=None, aim=None) for m in found]
        found += [Measure(f"MFU, T {t}", get("hybrid", t, "mfu"), None, 0.5, "{:.0%}") for t in (1024, 4096)]
    return found


def medians(runs: dict[tuple[str, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a model and length: medians of the runs that did not fail, or how one failed."""
    rows = []
    for (model, length), found in runs.items():
        good = [run for run in found if "error" not in run]
        row = {"model": model, "length": length, "runs": len(good)}
        for key, value in (good or found)[0].items():
            numbers = isinstance(value, (int, float))
            row[key] = statistics.median(run[key] for run in good) if numbers else value
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], first: str) -> str:
    """Medians, with the speed of training also as a ratio to the first model's."""
    lines = [["T", "model", "parameters", "training/s", f"{first} is", "peak GB", "prefill/s", "decoding/s", "share",
              "MFU"]]
    for row in sorted(rows, key=lambda row: row["length"]):
        if "error" in row:
            lines.append([str(row["length"]), row["model"], row["error"], *[""] * 7])
            continue
        base = next((r["training"] for r in rows if (r["model"], r["length"]) == (first, row["length"])
                     and "training" in r), None)
        lines.append([str(row["length"]), row["model"], f"{row['parameters']:,.0f}", f"{row['training']:,.0f}",
                      f"{base / row['training']:.2f}x" if base else "", f"{row['peak_gb']:.2f}",
                      f"{row['prefill']:,.0f}" if "prefill" in row else "",
                      f"{row['decoding']:,.1f}" if "decoding" in row else "", f"{row['share']:.0%}",
                      f"{row['mfu']:.0%}"])
    return show(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time per token against length, in training and in decoding, a line a model."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    import plot
    import train

    with style.context(plot.STYLE, after_reset=True):
        figure = Figure(figsize=(11, 4.6), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2)
        for axes, key, title in zip(panels, ("training", "decoding"), ("Training", "Decoding"), strict=True):
            for model in dict.fromkeys(row["model"] for row in rows):
                points = sorted((row["length"], 1e6 / row[key]) for row in rows if row["model"] == model and key in row)
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.8, label=model)
            axes.set(title=title, xlabel="length, in tokens", ylabel="microseconds a token", xscale="log", yscale="log")
            axes.set_xticks(sorted({row["length"] for row in rows}))
            axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
                axis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        panels[0].legend()
        with train.replacing(path) as file:
            figure.savefig(file, format="png", facecolor="white")


# == the command line =================================================================================================


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="peers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=model_name, default=list(MODELS), metavar="NAME",
                        help=f"{', '.join(KINDS)}; a hyphen and a number set the chunk length of Mamba layers "
                        f"(default: {' '.join(MODELS)})")
    parser.add_argument("--lengths", nargs="+", type=positive, default=[1024, 4096], metavar="N", help="in tokens")
    parser.add_argument("--size", choices=SIZES, help="of the models: 0.1M, 6.4M or 124M parameters (default: small; "
                        "gpt2 on CUDA)")
    parser.add_argument("--tokens", type=positive, default=4096, metavar="N", help="a step, at least one sequence")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="processes for each model and length")
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="timed steps in each")
    parser.add_argument("--decode", type=int, default=32, metavar="N", help="new tokens; 0: neither prefill nor these")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours, as train.py --compile does")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where")
    parser.add_argument("--out", type=Path, help="results, and the plot beside them (default: bench/results/, by date)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure every model in a process of its own, in turn; 1 where one failed."""
    import train

    out = args.out or results(f"peers-{args.device}")
    checked(args.device, out)
    size = SIZES[args.size or ("gpt2" if args.device == "cuda" else "small")]
    rest = dict(size=size, tokens=args.tokens, device=args.device, steps=args.steps, decode=max(0, args.decode),
                compile=args.compile)
    setting = about(args.device) | {"transformers": version("transformers"), "settings": rest}
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for length, i, model in itertools.product(args.lengths, range(args.rounds), args.models):
        found = alone(__file__, dict(model=model, length=length, **rest))
        runs.setdefault((model, length), []).append(found)
        said = found.get("error") or f"{found['training']:>11,.0f} tokens/s, {found['peak_gb']:.2f} GB"
        print(f"T {length:>6}  round {i + 1}  {model:<12} {said}", flush=True)
        rows = medians(runs)
        train.write_json(out, setting | {"rows": rows})
    draw(rows, out.with_suffix(".png"))
    promises = measures(rows, args.device == "cuda")
    print(f"\n{table(rows, args.models[0])}\n")
    print(show([["measure", "at least", "aim", "measured", ""], *(m.row() for m in promises)]))
    print(f"\nwritten to {out} and {out.with_suffix('.png').name}")
    return int(any("error" in row for row in rows))


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 1 where a model failed, 2 after one line about bad input."""
    args = make_parser().parse_args(argv)
    if args.one:
        print(json.dumps(measure(**args.one)))
        return 0
    return guarded("peers.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
