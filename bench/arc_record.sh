#!/usr/bin/env bash
# The ARC record run in one command: tasks, training, answers, scores, and what it all took, in bench/results/.
#
#   bench/arc_record.sh                                        # base, 19 minutes of training, on a CUDA GPU
#   bench/arc_record.sh --piece-minutes 8                      # a piece of it; again, until it says that all is done
#   until bench/arc_record.sh --piece-minutes 8; do [ $? = 75 ] || break; done
#   bench/arc_record.sh --add ~/re_arc/tasks --out-dir runs/arc-generated
#   setsid bench/arc_record.sh >record.log 2>&1 &              # survives the terminal
#   bench/arc_record.sh --smoke                                # toy size on a CPU, in under a minute
#
#   --preset NAME         train.py's preset: base or small (base)
#   --train-minutes X     minutes of training, over all pieces (19)
#   --views N             how often each output is answered (32)
#   --add FOLDER          more tasks for training: ConceptARC, a RE-ARC dump; may be given several times
#   --generated N         tasks to make of each list of pairs in such a dump (10)
#   --no-arc2             without the tasks that only ARC-AGI-2 has
#   --train-flags 'TEXT'  more flags for train.py, such as '--batch-size 32'
#   --solve-flags 'TEXT'  more flags for solve.py, such as '--ttt-steps 200'
#   --device NAME         cuda, with the Triton kernels and nothing less, or cpu (cuda)
#   --piece-minutes X     stop after so long (0: never); the same command then goes on
#   --out-dir FOLDER      where it works (runs/arc-record)
#
# Exit status: 0 all is done, 75 there is more to do, 2 a wrong flag or file, 130 or 143 stopped by a signal.
# The last checkpoint answers, whatever the score. Minutes are counted over all pieces, start-up included.
# PYTHON is the interpreter (python3). GIT_COMMIT names the commit where there is no git.
set -euo pipefail
export TRITON_CACHE_AUTOTUNING=1 PYTHONUNBUFFERED=1 # kernels are tuned by the first piece only
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

say() { echo "arc_record.sh: $*"; }

fail() {
    say "$*" >&2
    exit 2
}

# "from_here PATH" is the path as seen from the repository, where everything runs.
from_here() { realpath -m --relative-to="$here" -- "$1"; }

read_flags() {
    preset=base train_minutes=19 views=32 device=cuda out=$here/runs/arc-record smoke=()
    if [[ " $* " == *" --smoke "* ]]; then
        preset=nano train_minutes=0.1 views=2 device=cpu out=$here/runs/arc-smoke smoke=(--smoke)
    fi
    piece_minutes=0 generated=10 no_arc2=() train_flags='' solve_flags='' add=()
    while [ $# -gt 0 ]; do
        case $1 in
            --smoke) shift && continue ;;
            --no-arc2) no_arc2=(--no-arc2) && shift && continue ;;
            --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
            --preset | --train-minutes | --piece-minutes | --views | --generated | --train-flags | --solve-flags | \
                --device | --out-dir | --add) [ $# -gt 1 ] || fail "$1 wants a value" ;;
            *) fail "there is no flag $1 (--help lists them)" ;;
        esac
        case $1 in
            --preset) preset=$2 ;;
            --train-minutes) train_minutes=$2 ;;
            --piece-minutes) piece_minutes=$2 ;;
            --views) views=$2 ;;
            --generated) generated=$2 ;;
            --train-flags) train_flags=$2 ;;
            --solve-flags) solve_flags=$2 ;;
            --device) device=$2 ;;
            --out-dir) out=$2 ;;
            --add) add+=(--add "$(from_here "$2")") ;;
        esac
        shift 2
    done
    for number in "$train_minutes" "$piece_minutes"; do
        [[ $number =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "$number is not a number of minutes"
    done
    out=$(from_here "$out") results=bench/results
    [ ${#smoke[@]} = 0 ] || results=$out
    deadline=$(awk -v m="$piece_minutes" 'BEGIN { printf "%d", m ? 60 * m + 1 : 0 }') # in seconds of this piece
}

# "begin" takes hold of the folder, for one command at a time and always the same one.
begin() {
    local command
    command=$(printf '%q ' bench/arc_record.sh "${smoke[@]}" --preset "$preset" --train-minutes "$train_minutes" \
        --views "$views" "${add[@]}" --generated "$generated" "${no_arc2[@]}" --train-flags "$train_flags" \
        --solve-flags "$solve_flags" --device "$device" --out-dir "$out")
    mkdir -p "$out" || fail "--out-dir $out: cannot be written"
    exec 9>>"$out/lock"
    flock -n 9 || fail "$out: another piece is at work there"
    [ -e "$out/command" ] || echo "$command" >"$out/command"
    [ "$(<"$out/command")" = "$command" ] ||
        fail "$out holds another record, of $(<"$out/command")- go on with that, or name another --out-dir"
    if [ -e "$out/done" ]; then
        say "done already: $(<"$out/done"); nothing more to do"
        exit 0
    fi
    # A piece that could not say when it ended (power, kill -9) ended with its last written file.
    if [ -e "$out/clock" ] && [ "$(awk 'END { print $2 }' "$out/clock")" != stop ]; then
        echo "$(find "$out" -type f -printf '%T@\n' | sort -n | tail -n 1) stop" >>"$out/clock"
    fi
    child='' signal=''
    mark begin
    trap 'mark stop' EXIT
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM HUP
}

# "mark PHASE" notes that a phase begins now.
mark() { echo "$(date +%s.%N) $1" >>"$out/clock"; }

interrupted() {
    signal=$1
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
}

# "leave_if_over" ends this piece if a signal came or its time is up.
leave_if_over() {
    local status=${signal:-0}
    if [ "$status" = 0 ] && [ "$deadline" -gt 0 ] && [ $SECONDS -ge "$deadline" ]; then status=75; fi
    if [ "$status" != 0 ]; then
        "$python" bench/arc_record.py status "$out" || true
        say "stopped here; the same command goes on"
        exit "$status"
    fi
}

# "limited PHASE COMMAND..." runs the command for no longer than this piece may last.
limited() {
    local status=0
    leave_if_over
    mark "$1"
    timeout --kill-after=90 $((deadline ? deadline - SECONDS : 0)) "${@:2}" </dev/null &
    child=$!
    while true; do
        wait $child && status=0 || status=$?
        kill -0 $child 2>/dev/null || break # a trapped signal interrupts the wait, not the child
    done
    child=''
    leave_if_over
    [ $status = 0 ] || exit $status
}

# "few FROM TO N" copies the N smallest tasks of a folder.
few() {
    mkdir -p "$2"
    find "$1" -name '*.json' -printf '%s\t%p\n' | sort -n | awk -F '\t' -v n="$3" 'NR <= n { print $2 }' |
        while read -r file; do cp "$file" "$2"; done
}

prepare() {
    local data=$out/data official=() extras=()
    tasks=$data/arcagi+extras
    if [ ${#no_arc2[@]} -gt 0 ] && [ ${#add[@]} = 0 ]; then tasks=$data/arcagi; fi
    [ ! -e "$tasks" ] || return 0
    mark prepare
    if [ ${#smoke[@]} -gt 0 ]; then
        "$python" arc_data/prepare.py --out "$data/all"
        few "$data/all/arcagi/training" "$data/few/training" 6
        few "$data/all/arcagi/evaluation" "$data/few/evaluation" 6
        official=(--from "$data/few")
    fi
    if [ ${#no_arc2[@]} = 0 ]; then
        "$python" arc_data/prepare.py --version arcagi2 --out "$data"
        extras=(--add "$data/arcagi2")
        [ ${#smoke[@]} = 0 ] || few "$data/arcagi2/training" "$data/few2" 30
        [ ${#smoke[@]} = 0 ] || extras=(--add "$data/few2")
    fi
    "$python" arc_data/prepare.py "${official[@]}" "${extras[@]}" "${add[@]}" --generated "$generated" --out "$data"
}

train() {
    local flags kernels=auto
    [ "$device" != cuda ] || kernels=triton
    read -ra flags <<<"$train_flags"
    if "$python" bench/arc_record.py status "$out" >/dev/null; then return; fi
    if [ -e "$out/run/checkpoint.pt" ]; then
        limited train "$python" train.py --out-dir "$out/run" --resume
    else
        limited train "$python" train.py --dataset arc --preset "$preset" --data-dir "$tasks" \
            --demonstrations both --holdout 0 --max-minutes "$train_minutes" --eval-every 0 --device "$device" \
            --kernels "$kernels" --out-dir "$out/run" "${flags[@]}"
    fi
    "$python" bench/arc_record.py status "$out" || fail "train.py stopped before its time; the same command goes on"
}

solve() {
    local flags kernels=auto
    [ "$device" != cuda ] || kernels=triton
    read -ra flags <<<"$solve_flags"
    limited solve "$python" solve.py "$out/run" --data-dir "$tasks" --split evaluation \
        --views "$views" --device "$device" --kernels "$kernels" --out "$out/answers" "${flags[@]}"
}

read_flags "$@"
cd "$here"
begin
prepare
train
solve
mark write
"$python" bench/arc_record.py write "$out" "$results"
say "done: $(<"$out/done")"
