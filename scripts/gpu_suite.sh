#!/usr/bin/env bash
# All that needs a CUDA GPU, in at most 8 minutes and without a network: the tests marked `gpu`, the kernels against
# cuBLAS and cuSPARSELt, and a random model of 7 B parameters that decodes.
#
#   bash scripts/gpu_suite.sh [OUT]           rows of JSON in the folder OUT [default: gpu-results]
#   bash scripts/gpu_suite.sh --tiny [OUT]    tiny sizes, on the CPU where there is no GPU: that the script itself runs
#
# Nothing is installed: the checkout runs as it is, with $PYTHON, or .venv's Python if there is one, or python3. What lies
# on PYTHONPATH is found too.
set -uo pipefail
cd "$(dirname "$0")/.."

tiny=()
if [ "${1:-}" = --tiny ]; then tiny=(--tiny); shift; fi
out=${1:-gpu-results}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/eval:$PWD/tests:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
end=$((SECONDS + 470)) failed=0
mkdir -p "$out"
: > "$out/stages.jsonl"

# stage NAME SECONDS COMMAND...: run a command for at most so long, and no longer than all of it may take.
stage() {
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    echo "$name ..."
    [ $((end - SECONDS)) -lt "$limit" ] && limit=$((end - SECONDS))
    if [ "$limit" -le 0 ]; then status=124; else timeout "$limit" "$@" 2> "$out/$name.err" || status=$?; fi
    echo "{\"stage\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - began))}" | tee -a "$out/stages.jsonl"
    if [ $status -ne 0 ]; then
        failed=1
        [ $status -eq 124 ] && echo "$name: out of time" || { echo "$name failed:"; tail -n 5 "$out/$name.err"; }
    fi
}

to_file() { local file=$1; shift; "$@" > "$file"; }
export -f to_file

stage imports 60 "$python" - <<'CHECK'
import importlib.util, sys
needed = ("torch", "triton", "transformers", "numpy", "pytest", "accelerate", "safetensors", "greenlet", "psutil", "click", "tqdm", "xxhash", "yaml")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"not installed: {', '.join(missing)}")
CHECK
stage tests 230 "$python" -m pytest -q -m gpu -rs --junitxml="$out/tests.xml" \
    $(grep -l "mark\.gpu" tests/test_*.py)
stage products 200 bash -c 'to_file "$@"' _ "$out/products.jsonl" \
    "$python" scripts/bench_gpu_sparse.py --only product "${tiny[@]}"
stage decode 150 bash -c 'to_file "$@"' _ "$out/decode.jsonl" \
    "$python" scripts/bench_gpu_sparse.py --only decode "${tiny[@]}"
echo "rows and logs: $out"
exit $failed
