#!/usr/bin/env bash
# What needs a GPU, on this machine's: track fusion (correctness, determinism, sanitizer, times), and, where a TensorRT
# package is installed, engines of the example through the executor against the CPU engine; where vLLM and two GPUs are,
# our collective in vLLM against its own.
# Usage: scripts/gpu_check.sh [OUTPUT_FOLDER]      (default docs/results; CUDA_ARCH=90a chooses the target)
# Exit codes: 0 all good, 1 a check failed, 77 nothing was run because there is no nvcc or no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v nvcc > /dev/null; then
  echo "gpu_check: not run: there is no nvcc in PATH"
  exit 77
fi
if ! nvidia-smi --list-gpus 2> /dev/null | grep -q GPU; then
  echo "gpu_check: not run: there is no GPU (nvidia-smi lists none)"
  exit 77
fi
output="${1:-docs/results}"
build=build/gpu-check
mkdir -p "$output" "$build"
# Ranks share the GPU as streams: each needs a queue of its own, and no kernel may be loaded while another one waits.
export CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER
cmake -S plugins -B "$build" -DCMAKE_BUILD_TYPE=Release -DPT_ENABLE_CUDA=ON -DPT_BUILD_TESTS=ON \
  -DPT_CUDA_ARCHITECTURES="${CUDA_ARCH:-90a}" > "$build/configure.log"
cmake --build "$build" --target gpu_check pt_cuda_fusion --parallel > "$build/build.log"
program="$build/gpu_check/gpu_check"

failed=0
timeout 900 "$program" "$build/checks.json" || failed=1
sanitizers="not run: compute-sanitizer is not in PATH"
if command -v compute-sanitizer > /dev/null; then
  sanitizers="clean"
  for tool in memcheck racecheck; do
    timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 3 "$program" "$build/$tool.json" quick \
      > "$build/$tool.log" 2>&1 || { sanitizers="$tool failed, see $build/$tool.log"; failed=1; }
  done
fi
# Several NCCL ranks on one GPU: experimental, from NCCL 2.30 on. Its failure says nothing about this library.
nccl="passed"
NCCL_MULTI_RANK_GPU_ENABLE=1 timeout 120 "$program" "$build/nccl.json" nccl > "$build/nccl.log" 2>&1 \
  || nccl="not run: $(tail -n 1 "$build/nccl.log" | cut -c1-200)"
engines="$build/engines.json"
rm -f "$engines"
if python3 -c "import torch" 2> /dev/null; then
  timeout 1800 python3 -m pt_trtllm.testing.gpu_engines "$engines" || [ $? -eq 77 ] || failed=1
else
  echo '{"skipped": "python3 has no PyTorch", "lines": []}' > "$engines"
fi
# Two GPUs and vLLM, with this library in its processes: the same tokens by our collective as by vLLM's.
vllm="passed"
code=0
PT_CUDA_FUSION_LIBRARY="${PT_CUDA_FUSION_LIBRARY:-$(find "$PWD/$build" -name libpt_cuda_fusion.so | head -n 1)}" \
  timeout 2700 python3 -m pt_trtllm.testing.vllm_collectives examples/tiny-pt > "$build/vllm.log" 2>&1 || code=$?
if [ "$code" -ne 0 ]; then vllm="$(tail -n 1 "$build/vllm.log" | cut -c1-200)"; fi
if [ "$code" -ne 0 ] && [ "$code" -ne 77 ]; then vllm="FAILED: see $build/vllm.log"; failed=1; fi
python3 scripts/gpu_report.py "$build/checks.json" "$output" --sanitizers "$sanitizers" --nccl "$nccl" \
  --engines "$engines" --vllm "$vllm"
exit "$failed"
