#!/usr/bin/env bash
# Serves one engine whose ranks run on several hosts; Triton and rank 0 run on this one.
# Usage: scripts/serve_multi_node.sh ENGINE_DIR HOSTFILE [options of `pt-trtllm serve`...]
# HOSTFILE is mpirun's: one host a line, this one first, as in "node0 slots=1". Every host needs this environment and
# the engine at the same path, and must be reachable by ssh without a password.
set -euo pipefail
ENGINE_DIR="${1:?engine folder}" HOSTFILE="${2:?hostfile}"
shift 2
FOLDER="$(mktemp -d)"
trap 'rm -rf "$FOLDER"' EXIT
pt-trtllm deploy --engine-dir "$ENGINE_DIR" --model-repository "$FOLDER/repository" --hostfile "$HOSTFILE"
SERVER=""
trap 'kill -TERM $SERVER' TERM INT HUP # it lets requests end; this script waits for it
pt-trtllm serve --model-repository "$FOLDER/repository" "$@" &
SERVER=$!
CODE=0
wait "$SERVER" || CODE=$?
while kill -0 "$SERVER" 2>/dev/null; do # a signal has ended only the wait
  CODE=0
  wait "$SERVER" || CODE=$?
done
exit "$CODE"
