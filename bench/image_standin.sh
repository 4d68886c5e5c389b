#!/usr/bin/env bash
# Builds the Dockerfile for real and runs the image, on a machine with neither a container daemon, a container registry
# nor a GPU. The CUDA base is replaced by Debian 12 with its own Python 3.11 (guarded by PEP 668, as the real base's is)
# and a torch in the system's packages. It shows that every line of the Dockerfile works and that the image runs as any
# user, without a network and with Docker's 64 MB of /dev/shm. It shows nothing about CUDA.
#
#   apt-get install buildah crun mmdebstrap
#   sudo env PYTHON=.venv/bin/python bench/image_standin.sh [FOLDER]
#
# PYTHON is a Python 3.11 with requirements-dev.txt installed: it fetches the wheels, so that pip inside the build needs
# no index (apt-get there does use the network). TORCH is what the base gets. FOLDER keeps everything, about 10 GB.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(realpath -m "${1:-$(mktemp -d)}")
python=${PYTHON:-python3} torch=${TORCH:-torch>=2.9,<2.14}
mkdir -p "$work/wheels"
export BUILDAH_ISOLATION=chroot TMPDIR="$work"
store() { buildah --root "$work/store" --runroot "$work/run" "$@"; }
trap 'store rm --all >/dev/null 2>&1 || true' EXIT  # of this folder's store only
say() { echo "standin: $SECONDS s: $*"; }
fail() { say "FAILED: $*" >&2; exit 1; }
"$python" -c 'import sys, torch; sys.exit(sys.version_info[:2] != (3, 11))' || fail "PYTHON must be a 3.11 with torch"

if [ ! -e "$work/wheels/complete" ]; then
    say "fetching wheels"
    "$python" -m pip download -q -d "$work/wheels" "$torch" -r "$here/requirements-dev.txt"
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "$python" -m pip download -q -d "$work/wheels" --no-deps \
        --no-build-isolation --no-binary=mamba-ssm "$(grep -om1 'mamba-ssm==[0-9a-z.]*' "$here/Dockerfile")"
    touch "$work/wheels/complete"
fi
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"
mounts=(--volume "$work/wheels:/wheels:ro" --volume "$work/pip.conf:/etc/pip.conf:ro")

if ! store inspect --type image standin-base >/dev/null 2>&1; then
    say "the base: Debian, its Python, torch"
    [ -e "$work/debian.tar" ] ||
        mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-pip bookworm "$work/debian.tar"
    base=$(store from scratch)
    store add -q "$base" "$work/debian.tar" >/dev/null
    if store run "${mounts[@]}" "$base" -- python3 -m pip install -q "$torch" 2>"$work/refused"; then
        fail "the base's Python is not guarded by PEP 668"
    fi
    grep -q externally-managed-environment "$work/refused" || fail "$(cat "$work/refused")"
    store run "${mounts[@]}" "$base" -- python3 -m pip install -q --break-system-packages "$torch"
    store commit -q --rm "$base" standin-base >/dev/null
fi

# "build TAG CONTEXT [ARGUMENTS]" leaves buildah's log in TAG.log.
build() {
    local tag=$1 context=$2
    store build --layers --pull-never --build-arg BASE=localhost/standin-base "${mounts[@]}" -t "$tag" "${@:3}" \
        "$context" >"$work/$tag.log" 2>&1 || { tail -n 30 "$work/$tag.log"; fail "building $tag"; }
    say "built $tag: $(grep -c 'Using cache' "$work/$tag.log" || true) steps from the cache of" \
        "$(grep -c '^STEP' "$work/$tag.log")"
}

# "image TAG USER COMMAND..." runs the command (the image's own entrypoint where it is "-") without a network, with
# 64 MB of /dev/shm and a writable runs/ mounted.
image() {
    local tag=$1 user=$2 container
    shift 2
    container=$(store from --pull-never "$tag")
    local command=("$@")
    if [ "$1" = - ]; then
        mapfile -t command < <(store inspect "$container" | "$python" -c \
            'import json, sys; print(*json.load(sys.stdin)["OCIv1"]["config"]["Entrypoint"], sep="\n")')
        command+=("${@:2}")
    fi
    unshare --net --mount sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"' sh \
        buildah --root "$work/store" --runroot "$work/run" run --user "$user" --volume "$work/runs:/workspace/runs" \
        --env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}" "$container" -- "${command[@]}"
    store rm "$container" >/dev/null
}

# The context is what git would hand over, among things that .dockerignore has to keep out.
rm -rf "$work/context" "$work/runs" && mkdir -p "$work/context" "$work/runs" && chmod 1777 "$work/runs"
git -C "$here" -c safe.directory="$here" ls-files -z --cached --others --exclude-standard |
    tar -C "$here" --null --ignore-failed-read -T - -cf - | tar -C "$work/context" -xf -
mkdir -p "$work/context"/{runs/arc,.venv,tests/__pycache__,data,arc_data/arcagi/training}
for path in runs/arc/left.pt .venv/left tests/__pycache__/left.pyc data/left.npy arc_data/arcagi/training/left.json; do
    echo left >"$work/context/$path"
done

build hybrid-none "$work/context" --build-arg MAMBA=none
build hybrid "$work/context"
echo "# a change of the code" >>"$work/context/train.py"
build hybrid "$work/context"
awk '/^STEP.* RUN /{getline next_line; if (next_line !~ /Using cache/) exit 1}' "$work/hybrid.log" ||
    fail "a change of the code made a RUN step run again"
if (build hybrid-wrong "$work/context" --build-arg MAMBA=maybe >/dev/null 2>&1); then fail "MAMBA=maybe built"; fi

say "user, size, and nothing that .dockerignore keeps out"
image hybrid 1000:1000 sh -c '! find /workspace -name "left*" | grep . && id -u && du -sh /opt/venv /workspace'

say "the first command, bounded, as the image's own user"
image hybrid 1000:1000 - --dataset arc --batch-size 16 --max-steps 10 --eval-every 10
for file in metrics.jsonl checkpoint.pt curves.png predictions.png; do
    [ -s "$work/runs/arc/$file" ] || fail "the first command left no $file"
done
say "the same as a user whom the image does not know, without mamba-ssm"
image hybrid-none 4321:4321 - --dataset arc --batch-size 16 --max-steps 2 --eval-every 2
[ "$(stat -c %u "$work/runs/arc-2/checkpoint.pt")" = 4321 ] || fail "the second run is not the user's own"
say "tools/doctor.py in both images"
image hybrid 1000:1000 python tools/doctor.py
image hybrid-none 4321:4321 python tools/doctor.py
say "tests"
# Those that need nothing of bench/, which is not in the image.
image hybrid 4321:4321 python -m pytest -q tests/test_{scan,mamba,grids,gpu,doctor,recipes}.py
say "done; $work may be removed"
