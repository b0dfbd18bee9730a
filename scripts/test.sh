#!/usr/bin/env bash
# Makes .venv and runs every test: style and types, the C++ tests, then pytest (real MPI ranks, a real Triton server).
# Arguments go to pytest: scripts/test.sh -k mapping
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test dev serve rtx

# The C++ tests run beside the others, and say at the end how they went.
plugins_log="$(mktemp)"
setsid bash scripts/test_plugins.sh > "$plugins_log" 2>&1 &
plugins=$!
trap 'kill -- -"$plugins" 2> /dev/null || true; rm -f "$plugins_log"' EXIT

bash scripts/lint.sh
failed=0
pytest --numprocesses 2 --dist loadfile --durations 20 "$@" || failed=1
if wait "$plugins"; then
  grep -E "tests passed|^test_plugins:" "$plugins_log"
else
  cat "$plugins_log"
  failed=1
fi
exit "$failed"
