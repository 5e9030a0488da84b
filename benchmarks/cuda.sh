#!/usr/bin/env bash
# Everything about CUDA that needs a GPU: checks, tests, and the table of speeds. About 20 minutes on
# one card; it needs no network once the packages are installed:
#
#   pip install 'parscale[onnx-cuda13,cuda13,test]' onnxruntime-genai-cuda    (or from wheels: --find-links)
#   benchmarks/cuda.sh [CARD] [OUTPUT]     CARD as parscale cost --device names it (h100, a100, ...)
#
# OUTPUT, by default cuda-results, gets a file for each part. Every part runs, whatever fails.
set -uo pipefail
cd "$(dirname "$0")/.."
card=${1:-h100} output=${2:-cuda-results} python=${PYTHON:-python}
mkdir -p "$output"
failed=()

part() { # NAME SECONDS COMMAND ...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout "$seconds" "$@" >"$output/$name.txt" 2>&1 || failed+=("$name")
  tail -n "${LINES_SHOWN:-25}" "$output/$name.txt"
  echo "-- $name: $((SECONDS - start)) s"
}

part machine 60 nvidia-smi
part doctor 120 "$python" -c 'from parscale_cli.main import cli; cli(["doctor"])'
part tests 600 "$python" -m pytest -m cuda tests/export -q
for shape in qwen2.5-0.5b parscale-1.8b; do
  for precision in fp16 int4 int8; do
    part "$shape-$precision" 300 "$python" benchmarks/generate_onnx.py --provider cuda --device "$card" \
      --config "benchmarks/shapes/$shape.json" --streams 1,2,4,8 --precision "$precision" \
      --prompt 512 --tokens 128 --repeats 3
  done
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]} (see $output)"
  exit 1
fi
echo "all parts passed; $output has what they printed"
