#!/usr/bin/env bash
# The tests with the real vLLM on a CPU, in an environment of their own that is made first (build/vllm-env, some 3.5 GB) and
# holds this project's wheel, as a user's does. At most 15 minutes on two cores that are idle; the default suite has none of it.
# Usage: scripts/test_vllm.sh [ARGUMENTS OF PYTEST]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/vllm_env.sh build/vllm-env
python -c 'import vllm'  # what cannot be imported would skip every test
# Away from the sources, so that the installed package is what is tested.
tests="$PWD/tests"
mkdir -p build/vllm-run
cd build/vllm-run
python -m pytest -c "$tests/../pyproject.toml" --rootdir "$tests/.." -p no:cacheprovider --durations 15 "$tests/vllm" "$@"
