#!/usr/bin/env bash
# An ARC record in one command: train, answer the evaluation tasks, and write down what it took.
#
#   bench/record.sh --train-minutes 6 --views 8           # fits ten minutes of one GPU, start-up included
#   bench/record.sh --train-minutes 50 --views 32 --preset base --out runs/hour
#   bench/record.sh --train-minutes 0.1 --views 1 --preset nano --flags '--max-grid 5 --device cpu'    # a try on a CPU
#
#   --train-minutes X    minutes of training (6)             --data-dir FOLDER    tasks (arc_data/arcagi)
#   --views N            views of each output (8)            --flags 'TEXT'       more flags for train.py
#   --preset NAME        train.py's preset (small)           --solve-flags 'TEXT' more flags for solve.py
#   --out FOLDER         the run's folder (runs/record)
#
# Stopped and started again, the same command goes on; with more minutes it goes on longer. The last checkpoint answers,
# whatever its score. The result is FOLDER/record.json, beside FOLDER/solve-evaluation/report.html. GIT_COMMIT names the
# commit where there is no git, PYTHON the interpreter.
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$self")/.."
python=${PYTHON:-python3} minutes=6 views=8 preset=small out=runs/record data=arc_data/arcagi flags='' solve_flags=''
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$self" && exit 2; }
    case $1 in
        --train-minutes) minutes=$2 ;;
        --views) views=$2 ;;
        --preset) preset=$2 ;;
        --out) out=$2 ;;
        --data-dir) data=$2 ;;
        --flags) flags=$2 ;;
        --solve-flags) solve_flags=$2 ;;
        *) echo "record.sh: there is no flag $1 (the head of the file lists them)" >&2 && exit 2 ;;
    esac
    shift 2
done
trap 'exit 130' INT  # train.py saves and ends well; this ends too
trap 'exit 143' TERM HUP
export PYTHONUNBUFFERED=1 RECORD_BEGAN
RECORD_BEGAN=$(date +%s)
[ -d "$data" ] || "$python" arc_data/prepare.py --version "$(basename "$data")"

read -ra flags <<<"$flags"
read -ra solve_flags <<<"$solve_flags"
train=(train.py --out-dir "$out" --max-minutes "$minutes")
if [ -e "$out/checkpoint.pt" ]; then
    train+=(--resume)
else
    train+=(--dataset arc --preset "$preset" --data-dir "$data" "${flags[@]}")
fi
"$python" "${train[@]}"
answers=$out/solve-evaluation/answers.jsonl
if [ "$out/checkpoint.pt" -nt "$answers" ]; then rm -f "$answers"; fi  # those of other weights
export RECORD_TRAINED
RECORD_TRAINED=$(date +%s)
"$python" solve.py "$out" --views "$views" --split evaluation --out "$out/solve-evaluation" "${solve_flags[@]}"

"$python" - "$out" "python ${train[*]} && python solve.py $out --views $views ${solve_flags[*]}" <<'PYTHON'
import json, os, platform, subprocess, sys, time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import train
from data.files import read_json, read_text, write_json

out = Path(sys.argv[1])
config = read_json(out / "config.json")
lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
sources = Path(config["train"]["data_dir"]) / "sources.json"

def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

with torch.device("meta"):
    model = train.GPT(train.ModelConfig(**config["model"]))
cpu = [line.split(":")[1].strip() for line in read_text(Path("/proc/cpuinfo")).splitlines() if "model name" in line]
hardware = f"{len(cpu)} x {cpu[0]}" if cpu else platform.machine()
if torch.cuda.is_available() and config["train"]["device"] != "cpu":
    hardware = torch.cuda.get_device_name()
git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
began, trained, now = int(os.environ["RECORD_BEGAN"]), int(os.environ["RECORD_TRAINED"]), time.time()
write_json(out / "record.json", {
    "date": str(date.today()), "commit": git.stdout.strip() or os.environ.get("GIT_COMMIT"), "command": sys.argv[2],
    "hardware": hardware,
    "versions": {name: installed(name) for name in ("torch", "triton", "mamba-ssm", "numpy")} | {"python": sys.version},
    "minutes": {"training": lines[-1]["minutes"], "training with start-up, this time": (trained - began) / 60,
                "answering, this time": (now - trained) / 60},
    "parameters": {name: p.numel() for name, p in model.named_parameters() if "embed" in name} | {
        "all, with every table": sum(p.numel() for p in model.parameters())},
    "data": {"folder": config["train"]["data_dir"], "demonstrations": config["train"]["demonstrations"],
             "sources": read_json(sources) if sources.exists() else "official tasks only"},
    "steps": lines[-1]["step"], "config": config, "scores": read_json(out / "solve-evaluation" / "scores.json"),
})
print(f"record:           {out / 'record.json'}")
PYTHON
