#!/usr/bin/env bash
# The tests that need only the core dependencies, run against the wheel beside their lowest versions
# (requirements/floor.txt), or beside the newest ones that pyproject.toml allows and the index has.
# Usage: scripts/test_ranges.sh floor|ceiling [PYTEST ARGUMENT...]      (some five minutes, and 5 GB where torch brings CUDA)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
case "${1:-}" in
  floor) versions=(-c requirements/floor.txt) ;;
  ceiling) versions=(--upgrade --upgrade-strategy eager) ;;
  *) echo "test_ranges: usage: scripts/test_ranges.sh floor|ceiling [PYTEST ARGUMENT...]" >&2; exit 2 ;;
esac
ENVIRONMENT="$PWD/build/ranges-$1"
TREE="$ENVIRONMENT/tree"

# What these tests import is the core, and these tools; cases that compare with transformers skip.
tools="$(grep -E '^(pytest|pytest-timeout|hypothesis|tamm|ml_dtypes)==' requirements/constraints.txt)"
tests=(
  tests/unit/test_{bad_checkpoints,codecs,config,convert,detokenize,guided,hostile_files,kv_blocks,kv_cache_dtype}.py
  tests/unit/test_{kv_windows,logits,mapping,native_attention,native_linear,program,rope,sampling,sampling_params}.py
  tests/unit/test_{scheduler,service,speculative,stop_strings,tokenizer,track_fusion_results}.py
  tests/mpi/test_{example,llm_guided,llm_sampling}.py
)

wheel="$(bash scripts/wheel.sh "build/ranges-wheel" | tail -n 1)"
make_environment "$ENVIRONMENT" "$(digest pyproject.toml requirements/floor.txt requirements/constraints.txt)" true
"$ENVIRONMENT/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check pt-trtllm 2> /dev/null
pip_install "$ENVIRONMENT" "${versions[@]}" "$wheel"
pip_install "$ENVIRONMENT" $tools
"$ENVIRONMENT/bin/python" -m pip check --disable-pip-version-check
names="$(cut -d= -f1 requirements/floor.txt | grep -v '^#' | paste -sd '|')"
"$ENVIRONMENT/bin/python" -m pip freeze --disable-pip-version-check | grep -iE "^($names)==" | paste -sd ' '

# Beside the tests there is no source tree: what runs is the wheel.
rm -rf "$TREE" && mkdir "$TREE"
cp -r pyproject.toml tests examples engines "$TREE"
cd "$TREE"
export PATH="$ENVIRONMENT/bin:$PATH"
pytest -q "${@:2}" "${tests[@]}"
