"""Runs that are hard to lose: checkpoints that survive kill -9 and a full disk, locks, signals, logs, checked settings.

What has the name of a function in train.py is its twin, with the same arguments and meaning.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train
from data.files import UserError, fits, read_bytes, read_json, read_text, reason, replacing
from data.flags import flag
from train import GPT, PRESETS, Loader, ModelConfig, Optimizers, Runtime, TrainConfig

RETIRED = {"train": {"compile": False, "ema": 0.0, "save_failure": "stop"}, "model": {"ngroups": 1}}  # their defaults
RENAMED = {"kernels": {"torch": "auto"}}  # values that settings of earlier versions had
RESUMABLE = ("max_steps", "max_minutes", "eval_every", "save_every", "save_minutes", "batch_size", "grad_accum_steps",
             "data_dir", "device", "dtype", "kernels", "remat", "wandb")  # may change on a resume
SHARES = ("warmup_frac", "decay_frac", "focus", "dropout")
SIZES = ("batch_size", "grad_accum_steps", "max_grid", "vocab_size", "block_size", "d_model", "n_head", "d_state",
         "headdim", "d_ff", "chunk_size", "d_conv", "expand")  # must be at least 1
MOST_ROWS = 2**20
STATES = {"step", "exp_avg", "exp_avg_sq"}, {"momentum", "second"}  # what AdamW and NorMuon keep for a parameter
NUMBER, COUNTS, POSITION = (int, float), ("step", "minutes", "skipped"), ("epoch", "rows")
CHECKPOINT = {"model": {}, "optimizer": [{}], "step": int, "minutes": NUMBER, "skipped": int, "config": {},
              "rng": {"torch": Tensor}, "loader": {"epoch": int, "rows": int, "effective": int, "data": str}}


# == SETTINGS =========================================================================================================


def config_problems(model_cfg: ModelConfig, cfg: TrainConfig) -> list[str]:
    """Everything that is wrong with these settings, in the words of the flags, and with the environment."""
    return setting_problems(model_cfg, cfg) + process_problems()


def setting_problems(model_cfg: ModelConfig, cfg: TrainConfig) -> list[str]:
    """Everything that is wrong with these settings."""
    found = []
    for part in (cfg, model_cfg):
        for f in dataclasses.fields(part):
            value, choices = getattr(part, f.name), f.metadata.get("choices")
            low, high = 1 if f.name in SIZES else 0, 1 if f.name in SHARES else 2**31 - 1
            if choices and value not in choices:
                found.append(f"{flag(f.name)} {value[:40]!r} must be one of {', '.join(choices)}")
            elif type(value) in (int, float) and f.name != "document_token" and not low <= value <= high:
                found.append(f"{flag(f.name)} is {value}; it must be from {low} to {high}")
    if not cfg.max_steps and not cfg.max_minutes:
        found.append("--max-steps and --max-minutes are both 0: the run would never end; give one of them")
    if cfg.dataset in PRESETS and cfg.preset not in PRESETS[cfg.dataset]:
        found.append(f"--preset {cfg.preset[:40]!r} is none of {cfg.dataset}'s: {', '.join(PRESETS[cfg.dataset])}")
    if not found and (rows := cfg.batch_size * cfg.grad_accum_steps) > MOST_ROWS:
        found.append(f"--batch-size x --grad-accum-steps is {rows} sequences a step; it must be from 1 to {MOST_ROWS}")
    if not model_cfg.pattern or set(model_cfg.pattern) - set("MA") or len(model_cfg.pattern) > 1000:
        found.append(f"--pattern {model_cfg.pattern[:40]!r} must be 1 to 1000 letters M (Mamba-2) and A (attention)")
    return found or size_problems(model_cfg)


def size_problems(cfg: ModelConfig) -> list[str]:
    """Sizes that are possible alone but not together."""
    found, d_inner, per_head = [], cfg.expand * cfg.d_model, cfg.d_model // cfg.n_head
    if cfg.dropout == 1:
        found.append("--dropout is 1.0; it must be below 1")
    if "M" in cfg.pattern and d_inner % cfg.headdim:
        found.append(f"--headdim {cfg.headdim} must divide {cfg.expand} x --d-model = {d_inner}")
    if "A" in cfg.pattern and cfg.d_model % cfg.n_head:
        found.append(f"--n-head {cfg.n_head} must divide --d-model {cfg.d_model}")
    elif "A" in cfg.pattern and (per_head % 2 or cfg.grid and per_head < 8):
        found.append(f"--d-model / --n-head is {per_head}; rotary positions need it even, those of grids at least 8")
    return found


def load_config(folder: Path) -> tuple[ModelConfig, TrainConfig]:
    """The recorded settings of a run; UserError if config.json is missing or not ours.

    Settings of earlier versions that are gone are left out, if they were at their defaults or change no weights.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: there is no run in this folder")
    config = read_json(path)
    if not fits(config, {"model": {}, "train": {}}):
        raise UserError(f"{path}: not the settings of a run")
    try:
        found = tuple(settings(cls, config[part], RETIRED[part])
                      for cls, part in ((ModelConfig, "model"), (TrainConfig, "train")))
        if wrong := setting_problems(*found):
            raise ValueError(wrong[0])
        return found
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not the settings of a run ({reason(error)})") from None


def resume_config(given: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """A run's recorded settings, with what a resume may change replaced by the flags given."""
    if not given.get("out_dir"):
        raise UserError("--resume needs --out-dir, the folder of the run to go on with")
    model_cfg, cfg = load_config(Path(given["out_dir"]))
    cfg.out_dir = given["out_dir"]
    for one, other in (("max_steps", "max_minutes"), ("max_minutes", "max_steps")):
        if given.get(one) and other not in given:
            setattr(cfg, other, type(getattr(cfg, other))(0))  # the budget given is the one that counts
    found = []
    for name, value in given.items():
        recorded = getattr(cfg, name) if hasattr(cfg, name) else getattr(model_cfg, name)
        if name in RESUMABLE:
            setattr(cfg, name, value)
        elif value != recorded:
            found.append(f"{flag(name)} {value} cannot change on a resume; the run was started with {recorded}")
    if found := found + config_problems(model_cfg, cfg):
        raise UserError("\n".join(found))
    return model_cfg, cfg


def new_run_folder(cfg: TrainConfig) -> Path:
    """The folder of a fresh run; UserError if the one named holds a run."""
    folder = train.new_run_folder.plain(cfg)
    if (folder / "checkpoint.pt").exists():
        raise UserError(f"--out-dir {folder} holds a run; add --resume to continue it, or name another folder")
    return folder


def settings(cls: type, values: dict[str, Any], retired: dict[str, Any]) -> Any:
    """A dataclass of recorded values; TypeError where one is unknown, or of another type than the default."""
    if values.get("ngroups", 1) != 1:
        raise ValueError("ngroups is no setting any more; it was always 1")
    kept = {name: RENAMED.get(name, {}).get(value, value) if isinstance(value, str) else value
            for name, value in values.items() if name not in retired}
    found = cls(**kept)
    for f in dataclasses.fields(found):
        value, kind = getattr(found, f.name), type(f.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(f"{f.name} is {str(value)[:40]!r}, not of type {kind.__name__}")
    return found


def process_problems() -> list[str]:
    """What is wrong with the environment that torchrun sets, if it asks for several processes."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in (*names, "MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)}
    if given.get("WORLD_SIZE", "1").strip() in ("0", "1"):
        return []
    if len(given) == 5 and all(given[name].isdecimal() for name in (*names, "MASTER_PORT")):
        rank, world, local, port = (int(given[name]) for name in (*names, "MASTER_PORT"))
        with contextlib.suppress(OSError, ValueError):  # torch would try to reach a host that is none for two hours
            if rank < world and local < world and 0 < port < 2**16 and socket.getaddrinfo(given["MASTER_ADDR"], port):
                return []
    return [f"WORLD_SIZE is {given['WORLD_SIZE']!r}, but RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT do not fit it; "
            "start several processes with torchrun, or unset WORLD_SIZE for one"]


# == CHECKPOINTS ======================================================================================================


def check_content(path: Path) -> None:
    """OSError unless each record of a checkpoint has the checksum that it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(None, f"cut off or damaged: {reason(error)}") from None
    if bad:
        raise OSError(None, f"damaged at {bad}")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Plain tensors and containers, so that `torch.load(weights_only=True)` reads them; UserError if that fails.

    The checkpoint before it stays in place until this one is on disk and has been read back.
    """
    if not torch.stack(torch._foreach_norm([v.float() for v in state["model"].values()])).isfinite().all():
        raise UserError(f"{path}: not written, because weights are not finite; use a lower learning rate, or go on "
                        "from the checkpoint before")
    try:
        with replacing(path, check_content) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):  # torch hides what its file raised
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        needs, free = sum(t.nbytes for t in tensors_of(state)) / 1e6, shutil.disk_usage(path.parent).free / 1e6
        raise UserError(f"{path}: cannot be written ({reason(cause)}); it needs {needs:,.1f} MB where {free:,.1f} MB "
                        "are free; the checkpoint before it is untouched") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The last complete checkpoint of a run, on the CPU; UserError if it is not one of ours."""
    if not path.exists():
        raise UserError(f"{path}: no checkpoint there; start the run again without --resume")
    try:
        if not path.is_file():
            read_bytes(path)  # raises
        check_content(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(f"{path}: not a readable checkpoint ({reason(error)})") from None
    whole = fits(state, CHECKPOINT) and fits(state["loader"].get("files", []), [str])
    if not whole or not all(0 <= n < math.inf for n in (*map(state.get, COUNTS), *map(state["loader"].get, POSITION))):
        raise UserError(f"{path}: not a checkpoint of train.py")
    return state


def restore(state: dict, folder: Path, model: GPT, optimizers: Optimizers, loader: Loader,
            runtime: Runtime) -> tuple[int, float, int]:
    """Undo `snapshot`: step, minutes spent and steps skipped; UserError if the checkpoint does not fit."""
    path = folder / "checkpoint.pt"
    try:
        if state["loader"]["data"] != loader.fingerprint:
            raise ValueError("the tasks or shards are not those it was started with; name them with --data-dir")
        if (before := state["loader"]["effective"]) != loader.effective:
            raise ValueError(f"the run's effective batch is {before} sequences, not {loader.effective}")
        found = train.restore.plain(state, folder, model, optimizers, loader, runtime)
        for optimizer in optimizers.all:
            for p, values in optimizer.state.items():
                if values and values.keys() not in STATES:
                    raise ValueError("the optimizer's state is of another optimizer")
                for name, t in values.items():
                    shape = torch.Size() if name == "step" else p.shape
                    if not isinstance(t, Tensor) or t.dim() != len(shape) or t.shape[:1] != shape[:1]:
                        raise ValueError("the optimizer's state has other shapes than its parameters")
        return found
    except Exception as error:  # what is whole, but not ours, fails in many ways
        raise UserError(f"{path}: does not fit the run's settings and data ({misfit(error)})") from None


def misfit(error: Exception) -> str:
    """Why a checkpoint does not fit; PyTorch names the weights on the lines after its first."""
    return "weights of other names or shapes" if "loading state_dict" in str(error) else reason(error)


def load_model(folder: Path, model_cfg: ModelConfig) -> tuple[GPT, dict[str, Any]]:
    """The model of a run on the CPU, ready to answer, and its checkpoint.

    Runs of earlier versions may have an average of the weights ("ema"), which then answers.
    """
    from extras.memory import check_room

    state = load_checkpoint(folder / "checkpoint.pt")
    weights = state["model"]
    try:
        if state.get("ema"):
            weights = {name.removeprefix("module."): v for name, v in state["ema"].items() if name != "n_averaged"}
        check_room(model_cfg)
        model = GPT(model_cfg)
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder / 'checkpoint.pt'}: does not fit config.json ({misfit(error)})") from None
    return model.eval(), state


# == ONE PROCESS, AND HOW IT IS STOPPED ===============================================================================


class hold:
    """Holds a run folder until it is closed or this process ends in any way; UserError if another one holds it."""

    def __init__(self, folder: Path):
        self.file, nt = None, os.name == "nt"  # Windows has no locks on folders
        self.file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT) if nt else os.open(folder, os.O_RDONLY)
        try:
            if nt:
                import msvcrt

                msvcrt.locking(self.file, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise UserError(f"{folder}: another process is writing there; name another folder") from None
        except (OSError, ImportError):  # a file system or a Python without locks
            pass

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    __del__ = close


class watch_signals:
    """`up` is true once Ctrl-C, SIGTERM or SIGHUP has come: the loop finishes its step and saves. A second Ctrl-C stops
    at once, and so does any of them within `at_once()`."""

    def __enter__(self) -> watch_signals:
        self.up, self.hurry, self.before = False, False, {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            with contextlib.suppress(AttributeError, ValueError):  # Windows has no SIGHUP; a thread has no signals
                number = getattr(signal, name)
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP, and a script's `&` SIGINT
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: Any) -> None:
        self.up = True
        if number == signal.SIGINT:  # SIGTERM may come twice: from a supervisor, and forwarded by torchrun
            signal.signal(number, self.before[number])
        if self.hurry:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it nothing can be lost, and a signal ends what is done there; the loop then sees `up`."""
        try:
            self.hurry = not self.up
            yield
        except KeyboardInterrupt:
            if not self.up:
                raise
            print("\nstopped by a signal: the evaluation was left out")
        finally:
            self.hurry = False

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# == LOG ==============================================================================================================


class open_log:
    """`metrics.jsonl`, one object on each line; lines after `step` and lines torn by a crash are dropped first.

    The evaluation of `step` is dropped once it is made again, as a resume does where it was due.
    """

    file = wandb_run = None

    def __init__(self, folder: Path, step: int, config: dict[str, Any]):
        self.path, self.step, self.evaluation, kept = folder / "metrics.jsonl", step, None, []
        self.wandb_run = open_wandb(folder, config) if config["train"]["wandb"] else None
        for line in read_text(self.path, errors="replace").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                values = json.loads(line)
                if values["step"] <= step:
                    if values["step"] == step and "loss" not in values:
                        self.evaluation = len("".join(kept).encode())
                    kept.append(line + "\n")
        with replacing(self.path) as file:
            file.write("".join(kept).encode())
        self.file = open(self.path, "ab", buffering=0)

    def __call__(self, **values: Any) -> None:
        """One line; a number that is not finite becomes null. UserError on a full disk."""
        values = {k: v if not isinstance(v, float) else round(v, 6) if math.isfinite(v) else None
                  for k, v in values.items()}
        waiting = json.dumps(values).encode() + b"\n"
        try:
            if values["step"] == self.step and self.evaluation is not None:
                self.file.truncate(self.evaluation)
            while waiting:
                waiting = waiting[self.file.write(waiting) :]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({reason(error)})") from None
        if self.wandb_run:
            self.wandb_run.log(values)

    def __del__(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb_run:
            self.wandb_run.finish()


def open_wandb(folder: Path, config: dict[str, Any]) -> Any:
    """The Weights & Biases run of this folder, the same one after a resume; UserError if it cannot be had."""
    try:
        import wandb

        if not (folder / "wandb.id").exists():
            (folder / "wandb.id").write_text(os.urandom(4).hex(), encoding="utf-8")
        run = wandb.init(project="hybrid", name=folder.name, id=(folder / "wandb.id").read_text(encoding="utf-8"),
                         resume="allow", dir=folder, config=config)
        run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back, as a resume may
        return run
    except Exception as error:  # not installed, not logged in, no network
        raise UserError(f"--wandb: {reason(error)}; pip install wandb && wandb login, or leave --wandb out") from None


class AnswerLog:
    """`answers.jsonl`: the settings, then a line for each finished task; what is there already is not done again."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Open for appending; UserError where the file was made with other settings."""
        self.records: dict[str, dict] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        kept = list(filter(None, map(self.unseal, lines)))
        if kept:
            before = kept[0].get("settings")
            if before != settings:
                raise UserError(f"{path} was made {self.difference(before, settings)}; give another --out, or delete "
                                  "that file")
            self.records = {record["task"]: record for record in kept[1:]}
        with replacing(path) as file:
            file.write("".join(map(self.seal, [{"settings": settings}, *self.records.values()])).encode())
        self.file = open(path, "a", encoding="utf-8")

    @staticmethod
    def seal(record: dict) -> str:
        """A line that says whether it is whole."""
        return json.dumps(record | {"checksum": zlib.crc32(json.dumps(record).encode())}) + "\n"

    @staticmethod
    def unseal(line: str) -> dict | None:
        """What such a line holds; None where it is torn or damaged, and its task has to be done again."""
        try:
            record = json.loads(line)
            checksum = record.pop("checksum")
            return record if zlib.crc32(json.dumps(record).encode()) == checksum else None
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            return None

    @staticmethod
    def difference(before: Any, now: dict[str, Any]) -> str:
        """In words, how the settings of the file differ from those of now."""
        if not isinstance(before, dict):
            return "by another program"
        words = {"weights": "with other weights", "questions": "for other tasks"}
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        return " and ".join(words.get(n, f"with {n} {before.get(n)}, not {now.get(n)}") for n in changed)

    def write(self, records: list[dict]) -> None:
        """Add finished tasks; one that is there already stays as it is."""
        new = {record["task"]: record for record in records if record["task"] not in self.records}
        try:
            self.file.write("".join(map(self.seal, new.values())))
            self.file.flush()
        except OSError as error:  # a full disk does not say whose
            raise UserError(f"{self.file.name}: {reason(error)}; make room, and the same command goes on") from None
        self.records |= new

    def close(self) -> None:
        self.file.close()
