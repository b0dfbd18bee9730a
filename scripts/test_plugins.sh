#!/usr/bin/env bash
# The C++ tests of plugins/: once as shipped, once under ThreadSanitizer. Where there is nvcc, the CUDA part is compiled
# for every target as well; running it needs a GPU (scripts/gpu_check.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test dev serve rtx
for sanitizer in "" thread; do
  folder="build/plugins${sanitizer:+-$sanitizer}"
  cmake -S plugins -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPT_BUILD_TESTS=ON \
    -DPT_SANITIZE="$sanitizer" > /dev/null
  cmake --build "$folder" --parallel 2
  ctest --test-dir "$folder" --output-on-failure --timeout 120
done
if command -v nvcc > /dev/null; then
  # The library for every target, the check program for one; a kernel that spills registers fails the build.
  cmake -S plugins -B build/plugins-cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DPT_ENABLE_CUDA=ON -DPT_BUILD_TESTS=ON \
    -DPT_CUDA_ARCHITECTURES="80;90a;100" > /dev/null
  cmake --build build/plugins-cuda --parallel 2 --target pt_cuda_fusion gpu_check test_multicast
  ctest --test-dir build/plugins-cuda --output-on-failure -R test_multicast
else
  echo "test_plugins: the CUDA part was not compiled: there is no nvcc in PATH"
fi
