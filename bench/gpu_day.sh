#!/usr/bin/env bash
# All that wants an NVIDIA GPU, in one command and under nine minutes: tests and kernel parity, speed beside peers, memory
# by batch size, a minute of ARC, decoding, torch.compile on and off. One table comes last.
#
#   bench/gpu_day.sh                      # results in bench/results/<date>-gpu, small enough to commit
#   bench/gpu_day.sh --smoke              # the same at toy size on a CPU, in under 90 seconds; compiles nothing
#
#   --out FOLDER     where the results go
#   --device NAME    cuda, with the Triton kernels and nothing less, or cpu (cuda; with --smoke cpu)
#
# Needs requirements-dev.txt and, on CUDA, mamba-ssm: its Triton kernels suffice, causal-conv1d may be missing. Each
# piece has a time limit of its own; one that fails is reported and stops nothing.
# Exit status: 0 all pieces did well, 1 some did not, 2 a wrong flag, 130 or 143 stopped by a signal.
# PYTHON is the interpreter (python3). GIT_COMMIT names the commit where there is no git.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3} failed=0 children=()
export PYTHONUNBUFFERED=1

say() { echo "gpu_day.sh: $*"; }

fail() {
    say "$*" >&2
    exit 2
}

read_flags() {
    out=$here/bench/results/$(date +%F)-gpu device=cuda smoke=''
    if [[ " $* " == *" --smoke "* ]]; then smoke=1 device=cpu out=$here/runs/gpu-smoke; fi
    while [ $# -gt 0 ]; do
        case $1 in
            --smoke) shift && continue ;;
            --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
            --out | --device) [ $# -gt 1 ] || fail "$1 wants a value" ;;
            *) fail "there is no flag $1 (--help lists them)" ;;
        esac
        case $1 in
            --out) out=$(realpath -m -- "$2") ;;
            --device) device=$2 ;;
        esac
        shift 2
    done
    [[ $device =~ ^(cpu|cuda)$ ]] || fail "--device $device is neither cuda nor cpu"
}

begin() {
    cd "$here"
    "$python" -c 'import torch, transformers, pytest' 2>/dev/null ||
        fail "$python lacks torch, transformers or pytest; pip install -r requirements-dev.txt"
    "$python" -c 'import sys, torch; sys.exit(sys.argv[1] == "cuda" and not torch.cuda.is_available())' "$device" ||
        fail "--device cuda: PyTorch sees none; --smoke tries everything on a CPU"
    { mkdir -p "$out" && : >"$out/pieces.tsv"; } 2>/dev/null || fail "--out $out: cannot be written"
    rm -f "$out"/arc-{metrics.jsonl,config.json}
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    deadline=520
}

stop() {
    kill -TERM "${children[@]}" 2>/dev/null || true
    wait
    say "stopped; what was measured so far is in $out"
    exit "$1"
}

# "limited SECONDS LOG COMMAND..." runs a command in the background, with no terminal, for no longer than that.
limited() {
    timeout --kill-after=5 "$1" "${@:3}" >"$2" 2>&1 </dev/null &
    children+=($!)
}

# "piece NAME SECONDS COMMAND..." runs a command for no longer than that, or than is left; its log is NAME.log.
piece() {
    local name=$1 status=0 began=$SECONDS limit=$((deadline - SECONDS))
    [ "$limit" -lt "$2" ] || limit=$2
    rm -f "$out/$name".{log,json,png}
    if [ "$limit" -lt 5 ]; then
        status=unstarted
    else
        say "$name, for at most $limit s"
        limited "$limit" "$out/$name.log" "${@:3}"
        wait "${children[-1]}" || status=$?
    fi
    printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) >>"$out/pieces.tsv"
    if [ "$status" != 0 ]; then
        failed=1
        say "$name: status $status"
    fi
}

# Kernels are compiled by several processes at once and their speed tried anew by the first that is alone.
warm_up() {
    local model
    for model in hybrid granite-256; do
        limited 170 "$work/$model.log" "$python" bench/peers.py --device cuda --models "$model" --lengths 512 \
            --tokens 512 --rounds 1 --steps 1 --decode 2 --out "$work/$model.json"
    done
}

sizes() {
    peers=(--lengths 1024 4096 --tokens 32768 --rounds 1 --steps 10 --models hybrid mamba gpt2 granite-256)
    compiled=(--lengths 1024 --tokens 32768 --rounds 1 --steps 10 --models hybrid --decode 0 --compile)
    text=(--dataset fineweb --preset gpt2 --block-size 1024)
    arc=(--dataset arc --preset small --block-size 4096)
    batches=(--batch-sizes 2 8 16 32)
    decode=(--contexts 512 1024 2048 4096 --batch-sizes 1 16 --rounds 1)
    train=(--preset small --batch-size 8 --max-minutes 1)
    if [ "$device" = cuda ]; then export REQUIRE_GPU=1; fi
    if [ -z "$smoke" ]; then return; fi
    export TORCH_COMPILE_DISABLE=1
    peers=(--size toy --lengths 64 --tokens 64 --rounds 1 --steps 1 --decode 3 --models hybrid gpt2 granite-16)
    compiled=(--size toy --lengths 64 --tokens 64 --rounds 1 --steps 1 --decode 0 --models hybrid --compile)
    text=(--dataset fineweb --preset nano --block-size 64 --steps 1)
    arc=(--dataset arc --preset nano --block-size 256 --steps 1)
    batches=(--batch-sizes 1 2)
    decode=(--size toy --contexts 16 32 --batch-sizes 1 2 --rounds 1 --tokens 3)
    train=(--preset nano --packed --batch-size 2 --max-steps 3)
}

read_flags "$@"
begin
sizes
kernels=torch
if [ "$device" = cuda ]; then
    kernels=triton
    warm_up
fi
piece tests 150 "$python" -m pytest tests/test_gpu.py -m gpu -q -p no:cacheprovider
wait
export TRITON_CACHE_AUTOTUNING=1
piece peers 180 "$python" bench/peers.py --device "$device" "${peers[@]}" --out "$out/peers.json"
piece memory-text 80 "$python" bench/memory.py table --device "$device" "${text[@]}" "${batches[@]}" \
    --out "$out/memory-text.json"
piece memory-arc 80 "$python" bench/memory.py table --device "$device" "${arc[@]}" "${batches[@]}" \
    --out "$out/memory-arc.json"
piece tasks 20 "$python" arc_data/prepare.py --out "$work/data"
piece arc 110 "$python" train.py --dataset arc "${train[@]}" --data-dir "$work/data/arcagi" --holdout 0 \
    --eval-every 0 --save-every 0 --device "$device" --kernels "$kernels" --out-dir "$work/arc"
for file in metrics.jsonl config.json; do
    if [ -e "$work/arc/$file" ]; then cp "$work/arc/$file" "$out/arc-$file"; fi
done
piece decode 70 "$python" bench/decode.py --device "$device" "${decode[@]}" --out "$out/decode.json"
piece compile 90 "$python" bench/peers.py --device "$device" "${compiled[@]}" --out "$out/compile.json"
"$python" bench/gpu_table.py "$out" || failed=1
exit $failed
