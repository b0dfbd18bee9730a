#!/usr/bin/env bash
# The C++ tests of plugins/: once as shipped, once under ThreadSanitizer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test dev
for sanitizer in "" thread; do
  folder="build/plugins${sanitizer:+-$sanitizer}"
  cmake -S plugins -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPT_BUILD_TESTS=ON \
    -DPT_SANITIZE="$sanitizer" > /dev/null
  cmake --build "$folder" --parallel 2
  ctest --test-dir "$folder" --output-on-failure --timeout 120
done
