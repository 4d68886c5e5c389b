#!/usr/bin/env bash
# What a GPU is asked first, in ten minutes: do the kernels give the right numbers, how fast and in how much memory do the
# models train, beside those of transformers, and what do two minutes of ARC and its answers look like.
#
#   bench/gpu_day.sh [FOLDER]             # results in FOLDER (bench/results/<date>-gpu) and FOLDER/day.tar.gz
#   SMOKE=1 bench/gpu_day.sh /tmp/day     # the same at toy size on a CPU, in two minutes
#   bench/gpu_day.sh --smoke [FOLDER]     # also so
#
# In order of worth, because time may run out: every piece has a limit, one that fails stops nothing, and what is known is
# in results.jsonl at once; small.log has a step by kernels, too. Each piece compiles what it needs before it measures.
# Needs no network once arc_data/arcagi is there; transformers is needed for its two models only. GIT_COMMIT names the
# commit where there is no git, PYTHON the interpreter, SECONDS_IN_ALL the time there is (570), MINUTES those of training
# on ARC (2).
# Exit status: 0 all pieces did well, 1 some did not (pieces.tsv says which).
set -uo pipefail
if [ "${1:-}" = --smoke ]; then export SMOKE=1 && shift; fi
out=$(realpath -m -- "${1:-bench/results/$(date +%F)-gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3} smoke=${SMOKE:-} failed=0 patience=1 work=$(mktemp -d)
if [ -n "$smoke" ]; then patience=4; fi  # a CPU may be busy
deadline=${SECONDS_IN_ALL:-$((570 * patience))}
GIT_COMMIT=${GIT_COMMIT:-$(git rev-parse HEAD 2>/dev/null || true)}
export GIT_COMMIT PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$out" && : >"$out/pieces.tsv" && : >"$out/results.jsonl" || exit 1

# Whatever happens, what was measured so far is put into one archive.
# shellcheck disable=SC2329  # called by the trap
pack() {
    find "$work/arc" -type f -size -2000k -exec cp -t "$out" {} + 2>/dev/null
    tar -C "$out" --exclude=day.tar.gz -czf "$work/day.tar.gz" . && mv "$work/day.tar.gz" "$out" && rm -r "$work"
    echo "gpu_day.sh: $out/day.tar.gz, $(du -k "$out/day.tar.gz" | cut -f1) kB"
}
trap pack EXIT
trap 'exit 143' INT TERM HUP

# "piece NAME SECONDS COMMAND..." runs a command for no longer than that, or than is left; its output is NAME.log.
piece() {
    local name=$1 limit=$(($2 * patience)) began=$SECONDS status=unstarted
    [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
    if [ "$limit" -gt 3 ]; then
        timeout --kill-after=5 "$limit" "${@:3}" >"$out/$name.log" 2>&1 </dev/null
        status=$?
    fi
    [ "$status" = 0 ] || failed=1
    printf '%s\t%s\t%s s\n' "$name" "$status" $((SECONDS - began)) | tee -a "$out/pieces.tsv"
    tail -n 1 "$out/$name.log" 2>/dev/null | cut -c1-300
}

day=("$python" bench/gpu_day.py)
sizes=(32 16 8 2) packed=16 minutes=${MINUTES:-2} batch=16 flags=() questions=100
if [ -n "$smoke" ]; then sizes=(2 1 1) packed=2 minutes=0.2 batch=4 flags=(--preset nano --max-grid 4) questions=3; fi

piece parity 120 "${day[@]}" parity "$out/results.jsonl"
piece small 90 "${day[@]}" small "$packed" "$out/results.jsonl"
piece arc 175 "$python" train.py --dataset arc --batch-size "$batch" --max-minutes "$minutes" --out-dir "$work/arc" \
    --eval-every 0 --save-every 0 "${flags[@]}"
mapfile -t tasks < <(find arc_data/arcagi/evaluation -name '*.json' -exec basename {} .json \; | sort | head -n "$questions")
piece answers 75 "$python" solve.py "$work/arc" --views 4 --tasks "${tasks[@]}"
piece gpt2 90 "${day[@]}" gpt2 "${sizes[@]}" "$out/results.jsonl"
piece hf-gpt2 45 "${day[@]}" hf-gpt2 "${sizes[0]}" "$out/results.jsonl"
piece hf-granite 60 "${day[@]}" hf-granite "${sizes[2]}" "$out/results.jsonl"
exit $failed
