#!/usr/bin/env bash
# From the PT checkpoint in examples/ to text streamed from a Triton server, with nothing but Python 3.11, git, gcc and cmake on the machine.
# RANKS=4 bash scripts/demo.sh takes another number of MPI ranks (1, 2 or 4 for the example's 4 tracks).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RANKS="${RANKS:-2}"
OUT="${OUT:-demo_output}"

step() { printf '\n== %s\n' "$*"; "$@"; }

echo "== environment: ${VENV:-.venv} (a minute or two the first time)"
source scripts/setup.sh serve
mkdir -p "$OUT"
step pt-trtllm convert --model-dir examples/tiny-pt --output-dir "$OUT/checkpoint" --world-size "$RANKS" --dtype float32 --force
step pt-trtllm build --checkpoint-dir "$OUT/checkpoint" --output-dir "$OUT/engine" --backend cpu --force
step pt-trtllm run --engine-dir "$OUT/engine" --max-new-tokens 80 --temperature 0.7 --top-k 40 --seed 4 \
  --output-json "$OUT/answers.json" \
  --prompt "It is a truth" "She had never been" "The evening was"
step pt-trtllm deploy --engine-dir "$OUT/engine" --model-repository "$OUT/repository" --force

printf '\n== pt-trtllm serve --model-repository %s (in the background, on free ports)\n' "$OUT/repository"
: > "$OUT/serve.out"
pt-trtllm serve --model-repository "$OUT/repository" --grpc-port 0 --http-port 0 --metrics-port 0 > "$OUT/serve.out" 2>&1 &
SERVER=$!
trap 'kill "$SERVER" 2>/dev/null && wait "$SERVER" || true' EXIT
until grep -q '^ready: ' "$OUT/serve.out"; do
  kill -0 "$SERVER" 2>/dev/null || { cat "$OUT/serve.out" >&2; exit 1; }
  sleep 0.2
done
cat "$OUT/serve.out"
URL="$(sed -n 's/^ready: gRPC \([^,]*\),.*/\1/p' "$OUT/serve.out")"
step pt-trtllm client --url "$URL" --prompt "It is a truth" --max-tokens 80 --temperature 0.7 --top-k 40 --seed 4

echo
echo "== done: $OUT/checkpoint (per-rank weights), $OUT/engine (per-rank engines), $OUT/answers.json, $OUT/repository (for Triton)"
echo "   look inside:  .venv/bin/pt-trtllm inspect $OUT/engine"
