#!/usr/bin/env bash
# One entry for people and CI: style, types, C++ format. `scripts/lint.sh --fix` repairs what can be repaired.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test dev serve rtx
mapfile -t cpp < <(git ls-files 'plugins/*.cpp' 'plugins/*.h' 'plugins/*.cu' 'plugins/*.cuh')
if [ "${1:-}" = "--fix" ]; then
  ruff format . && ruff check --fix .
  [ "${#cpp[@]}" -eq 0 ] || clang-format -i "${cpp[@]}"
fi
ruff format --check --quiet .
ruff check --quiet .
mypy
[ "${#cpp[@]}" -eq 0 ] || clang-format --dry-run --Werror "${cpp[@]}"
echo "lint: ok"
