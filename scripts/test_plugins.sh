#!/usr/bin/env bash
# The C++ tests of plugins/: once as shipped, once under ThreadSanitizer. Where there is nvcc, the CUDA part is compiled
# for every target as well; running it needs a GPU (scripts/gpu_check.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test dev serve rtx
configure() {  # FOLDER OPTION...
  cmake -S plugins -B "$1" -G Ninja -DPT_BUILD_TESTS=ON "${@:2}" > /dev/null
}
run() {  # FOLDER OPTION...
  ctest --test-dir "$1" --output-on-failure "${@:2}"
}
# The tree of the installed libraries: scripts/setup.sh has compiled it with its tests.
configure build/wheel -DCMAKE_BUILD_TYPE=Release
cmake --build build/wheel --parallel 2
run build/wheel
# Which thread computes what is decided outside the hot loops, alike for every instruction set: one of them is enough,
# and so is -O1, which compiles in half the time.
configure build/plugins-thread -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -DNDEBUG" -DPT_SANITIZE=thread \
  -DPT_X86_KERNELS=OFF
cmake --build build/plugins-thread --parallel 2
run build/plugins-thread
if command -v nvcc > /dev/null; then
  # The library for every target, the check program for one; a kernel that spills registers fails the build.
  configure build/plugins-cuda -DCMAKE_BUILD_TYPE=Release -DPT_ENABLE_CUDA=ON -DPT_CUDA_ARCHITECTURES="80;90a;100" \
    -DPT_X86_KERNELS=OFF
  cmake --build build/plugins-cuda --parallel 2 --target pt_cuda_fusion gpu_check test_multicast
  run build/plugins-cuda -R test_multicast
else
  echo "test_plugins: the CUDA part was not compiled: there is no nvcc in PATH"
fi
