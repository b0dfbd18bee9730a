"""Finding a tritonserver, and what the one inside the `nvidia-pytriton` wheel needs to run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm.errors import ConfigError, ServingError

CONTAINER_BIN = "/opt/tritonserver/bin"
CONTAINER_BACKENDS = Path("/opt/tritonserver/backends")
"""Where every tritonserver but the embedded one looks, unless it is told otherwise."""
VLLM_CONTAINER = "tritonserver:<xx.yy>-vllm-python-py3"


@dataclass(frozen=True)
class ServerBinary:
    path: Path
    is_embedded: bool

    def arguments(self, work: Path) -> list[str]:
        """Options that only this binary needs; `work` is a folder to fill."""
        if not self.is_embedded:
            return []
        return [f"--backend-directory={_backend_folder(self.path.parents[1], work)}"]

    def environment(self) -> dict[str, str]:
        """The models run in this Python environment: its interpreter's library and its packages come first."""
        env = dict(os.environ)
        env["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), env.get("PATH", os.defpath)])
        libraries = [str(sysconfig.get_config_var("LIBDIR") or "")] if self.is_embedded else []
        if self.is_embedded:
            libraries.append(str(self.path.parents[3] / "nvidia_pytriton.libs"))
        libraries.append(env.get("LD_LIBRARY_PATH", ""))
        env["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in libraries if path)
        return env


def embedded_tritonserver() -> Path | None:
    """Inside the `nvidia-pytriton` wheel; found without importing it."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "tritonserver/bin/tritonserver"
    return path if path.is_file() else None


def system_tritonserver() -> Path | None:
    found = shutil.which("tritonserver") or shutil.which("tritonserver", path=CONTAINER_BIN)
    return Path(found) if found else None


def find_tritonserver(chosen: Path | None = None) -> ServerBinary:
    """The chosen one, else the system's (in Triton's container), else the embedded one."""
    if chosen is not None:
        if not (chosen.is_file() and os.access(chosen, os.X_OK)):
            raise ConfigError(f"{chosen} is not an executable file; expected a tritonserver")
        return ServerBinary(chosen.resolve(), chosen.resolve() == embedded_tritonserver())
    system = system_tritonserver()
    if system is not None:
        return ServerBinary(system, is_embedded=False)
    embedded = embedded_tritonserver()
    if embedded is None:
        raise ConfigError("no tritonserver found; install one with: pip install 'pt-trtllm[serve]', or name yours "
                           "with --tritonserver")  # fmt: skip
    return ServerBinary(embedded, is_embedded=True)


def check_backends(repository: Path, binary: ServerBinary, extra: Sequence[str]) -> None:
    """Raises for a model of Triton's vLLM backend on a server without it: Triton's own words do not help."""
    if any(argument.startswith("--backend-directory") for argument in extra):
        return
    wanted = [path.parent.name for path in sorted(repository.glob("*/config.pbtxt")) if _uses_vllm(path)]
    if wanted and (binary.is_embedded or not (CONTAINER_BACKENDS / "vllm").is_dir()):
        raise ConfigError(
            f"{repository}: model {wanted[0]} needs Triton's vllm backend, which {binary.path} does not have; run "
            f"tritonserver in NVIDIA's container {VLLM_CONTAINER} with pt-trtllm installed in it (docs/vllm.md has the "
            "command), or say where the backend is: -- --backend-directory=FOLDER"
        )


def _uses_vllm(config: Path) -> bool:
    try:
        text = config.read_text(errors="replace") if config.is_file() else ""
    except OSError:
        return False  # Triton says it in its own words
    return re.search(r'^\s*backend\s*:\s*"vllm"', text, re.MULTILINE) is not None


def _backend_folder(root: Path, work: Path) -> Path:
    """The Python backend with the stub for this interpreter beside it; site-packages stay as they are."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = ", ".join(sorted(path.name for path in (root / "python_backend_stubs").iterdir()))
        raise ServingError(f"the embedded tritonserver has no stub for Python {version}, only for {have}")
    folder = work / "backends/python"
    folder.mkdir(parents=True)
    for source in (*(root / "backends/python").glob("*.so"), root / "backends/python/triton_python_backend_utils.py"):
        (folder / source.name).symlink_to(source)
    (folder / stub.name).symlink_to(stub)
    return folder.parent
