#!/usr/bin/env bash
# Makes .venv and runs every test: style and types, the C++ tests, then pytest (real MPI ranks, a real Triton server).
# Arguments go to pytest: scripts/test.sh -k mapping
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test dev serve rtx
bash scripts/lint.sh
bash scripts/test_plugins.sh

failed=0
# Exit code 5: the arguments select none of these tests.
run() { pytest "$@" || [ $? -eq 5 ] || failed=1; }
# Tests of track fusion look at all groups in shared memory: nothing may run beside them. The last two keep all cores
# busy by themselves.
run --numprocesses 2 --ignore-glob='*/test_track_fusion_*' tests/unit "$@"
run tests/unit/test_track_fusion_* tests/mpi tests/triton "$@"
exit "$failed"
