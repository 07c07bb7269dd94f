#!/usr/bin/env bash
# All that is to be run once on a machine with an NVIDIA GPU, which may be bare: Python 3.11 or newer with a CUDA build
# of PyTorch and NumPy, nvidia-smi, no network, no Flower. Not run on a GPU yet: none was at hand.
#
#     WHEELS=/path/to/wheels benchmarks/gpu_all.sh OUT      # PYTHON=... names the Python that has PyTorch
#
# Where there is a network, make the wheels first, for the Python of that machine, here 3.12; Ray is too large, and not
# needed by the deployment engine:
#
#     pip download -d wheels --python-version 3.12 --only-binary=:all: flwr==1.42.0 matplotlib
#
# It leaves in OUT: nvidia-smi.txt, gpu_memory.md and .svg, a log and a folder of results for each run, and summary.txt.
# Exit status: 0 if each step ended with 0.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
out=${1:?give the folder for the results} python=${PYTHON:-python3} failed=0
mkdir -p "$out" && out=$(cd "$out" && pwd -P)

step() { # step NAME COMMAND ...: run it, keep what it says, go on where it fails
    local name=$1 status=0
    shift
    echo "== $name: $*" | tee -a "$out/summary.txt"
    "$@" >"$out/$name.log" 2>&1 || status=$?
    tail -n 3 "$out/$name.log" | tee -a "$out/summary.txt"
    echo "   exit status $status" | tee -a "$out/summary.txt"
    [ "$status" = 0 ] || failed=1
    return "$status"
}

example() { # example NAME FOLDER ARGUMENT ...: run it, and keep its results
    local name=$1 folder=$2
    shift 2
    step "$name" "$work/$folder/run.sh" "$@"
    mkdir -p "$out/$name"
    cp -r "$work/$folder/runs/latest/." "$out/$name/" 2>/dev/null
    rm -rf "$out/$name/flwr-home"
    grep -h "^Device:\|^Plan:\|^WARNING:" "$out/$name.log" | tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
nvidia-smi >"$out/nvidia-smi.txt" 2>&1

# 1. The promise itself, which takes PyTorch alone.
step gpu_memory "$python" "$here/benchmarks/gpu_memory.py" --out "$out"

# 2. Flower, in an environment that sees the PyTorch which is there, and a copy of the examples that takes any versions.
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
"$python" -m venv --system-site-packages "$work/.venv" || exit 1
install=(-m pip install --quiet flwr==1.42.0 matplotlib)
[ -n "${WHEELS:-}" ] && install+=(--no-index --find-links "$WHEELS")
step install "$work/.venv/bin/python" "${install[@]}" || exit 1
cp -r "$here/basic" "$here/multiprocessing" "$work"
for folder in basic multiprocessing; do
    rm -rf "${work:?}/$folder/runs"
    printf '%s\n' flwr torch numpy matplotlib >"$work/$folder/requirements.txt"
done
export PYTHON="$work/.venv/bin/python" ENGINE=deployment DATASET="${DATASET:-synthetic}" DATA_DIR="${DATA_DIR:-$work/data}"

example basic basic 3 3 3 3
example basic-cpu basic 3 3 3 3 device=cpu
example multiprocessing multiprocessing 10 10 4 3
GPU_SLOTS=2 example two-at-once multiprocessing 16 16 8 3
GPU_SLOTS=8 example eight-at-once multiprocessing 16 16 8 3
example by-what-was-measured multiprocessing 16 16 8 3
example in-place multiprocessing 10 10 4 3 isolation=false

# 3. What a child costs, call by call; the data is there by now.
step isolation "$PYTHON" "$here/benchmarks/isolation.py" --device cuda --calls 20 --out "$out"

# 4. What must not happen: the GPU hidden, and asked for all the same.
CUDA_VISIBLE_DEVICES='' example hidden multiprocessing 10 10 4 1

echo "results in $out; $([ "$failed" = 0 ] && echo "all steps ended well" || echo "some steps FAILED")"
exit "$failed"
