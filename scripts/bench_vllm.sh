#!/usr/bin/env bash
# PT against a Llama of equal size in vLLM, and our own engine beside it: `scripts/bench_vllm.sh PYTHON [FOLDER]`, about an hour on two
# idle cores. PYTHON is the interpreter of an environment with vLLM and this package (docs/vllm.md). Leaves text and JSON in FOLDER:
# shared memory first, then, as root, links that delay.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 PYTHON [FOLDER]" >&2; exit 2; }
python=$(realpath --no-symlinks "$1") out=$(realpath -m "${2:-build/bench-vllm}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test
set +e  # the environment is there; a measurement that fails leaves the other
mkdir -p "$out" || exit 2
failed=0

# run NAME OPTION...: the table in NAME.txt, which begins with the command; everything else in NAME.json.
run() {
  local name=$1
  shift
  echo "== $name"
  printf '$ %s\n\n' "pt-trtllm bench --vllm PYTHON $*" >"$out/$name.txt"
  pt-trtllm bench --vllm "$python" "$@" --json "$out/$name.json" >>"$out/$name.txt" || failed=1
  cat "$out/$name.txt"
}

run shared_memory --max-seconds 1200
if [ "$(id -u)" -eq 0 ]; then
  run links --repeats 3 --link-delay 0us --link-delay 50us --link-delay 200us --link-delay 1ms --max-seconds 3600
else
  echo "links that delay need root: left out"
fi
exit "$failed"
