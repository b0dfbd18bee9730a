#!/usr/bin/env bash
# All benchmarks that a machine without a GPU can run, one after another, in about 25 minutes:
# `scripts/bench_all.sh [FOLDER]` leaves JSON, text, a report in HTML and a trace, and SUMMARY.md, in FOLDER.
# Every step has a limit of its own; one that fails is named in the summary, and the others still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh test
set +e  # the environment is there; from here on a failure is only noted
out="${1:-build/bench}"
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
rm -f "$out"/*.json "$out"/*.txt "$out"/*.html "$out"/SUMMARY.md
failed=0

# run NAME LIMIT_S COMMAND...: output in NAME.txt, which begins with the command and ends with its exit code.
run() {
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  printf '$ %s\n\n' "$*" >"$out/$name.txt"
  timeout --kill-after=20 "$limit" "$@" >>"$out/$name.txt" 2>&1
  code=$?
  printf '\nexit code %d after %d s\n' "$code" "$((SECONDS - began))" >>"$out/$name.txt"
  tail -n 1 "$out/$name.txt"
  [ "$code" -eq 0 ] || failed=1
}

links=()
[ "$(id -u)" -ne 0 ] || links=(--link-delay 50us --link-delay 200us)
kinds=none,int8_wo,int4_wo

run track_fusion 90 python scripts/bench_track_fusion.py --ranks 2 4 --json "$out/track_fusion.json"
run linear 90 python scripts/bench_linear.py --repeats 9 --json "$out/linear.json"
run attention 120 python scripts/bench_attention.py --rounds 3 --json "$out/attention.json"
run numerics 60 python scripts/bench_numerics.py --json "$out/numerics.json"
run pipeline 60 python scripts/bench_pipeline.py --gigabytes 1 --json "$out/pipeline.json"
run small_pt_tp 230 pt-trtllm bench --shape small --sync-interval 4 --sync-interval 8 "${links[@]}" \
  --max-seconds 200 --json "$out/small_pt_tp.json" --html "$out/small_pt_tp.html" --trace "$out/small_pt_tp.trace.json"
run small_llama 130 pt-trtllm bench --shape small --models tp,one --quantization "$kinds" \
  --num-requests 0 --repeats 3 --max-seconds 110 --json "$out/small_llama.json"
run large_pt 290 pt-trtllm bench --shape large --models pt --quantization "$kinds" \
  --max-seconds 260 --json "$out/large_pt.json"
run large_llama 320 pt-trtllm bench --shape large --models tp,one --quantization "$kinds" \
  --max-seconds 290 --json "$out/large_llama.json"
python scripts/bench_summary.py "$out" || failed=1
echo "$out/SUMMARY.md"
exit "$failed"
