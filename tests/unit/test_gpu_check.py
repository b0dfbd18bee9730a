"""The GPU check on machines without a GPU: it says so, and its report can be made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def run_check(path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path}
    script = str(ROOT / "scripts/gpu_check.sh")
    return subprocess.run(["/bin/bash", script], env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "grep"):
        (folder / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    return folder


def test_without_nvcc_it_says_so_and_exits_with_its_own_code(tools: Path) -> None:
    run = run_check(str(tools))
    assert (run.returncode, run.stdout) == (77, "gpu_check: not run: there is no nvcc in PATH\n")


def test_without_a_gpu_it_says_so_and_exits_with_its_own_code(tools: Path) -> None:
    (tools / "nvcc").symlink_to("/bin/true")
    run = run_check(str(tools))
    assert (run.returncode, run.stdout) == (77, "gpu_check: not run: there is no GPU (nvidia-smi lists none)\n")


def test_the_report_shows_failures_and_times(tmp_path: Path) -> None:
    lines = [
        {"device": "a GPU", "compute_capability": "9.0", "multiprocessors": 1, "driver": 1, "runtime": 1},
        {"check": "streams", "ranks": 2, "algorithm": "pull", "codec": "int8", "good": False},
        {"note": "NVLS", "text": "not run: one device"},
        {"measure": "limits", "copy_gb_per_s": 4000, "launch_us": 1.5},
        {"measure": "fuse", "ranks": 2, "algorithm": "pull", "codec": "fp8", "bytes": 8192, "norm": False, "us": 3.25},
        {"measure": "fuse", "ranks": 2, "algorithm": "pull", "codec": "fp8", "bytes": 8192, "norm": True, "us": 4.5},
    ]
    checks = tmp_path / "checks.json"
    checks.write_text(json.dumps(lines))
    engines = tmp_path / "engines.json"
    good = {"check": "engine", "dtype": "float16", "quantization": "none", "good": True, "logits_error": 0.002,
            "bound": 0.01, "same_tokens": 47, "tokens": 48, "wrong_tokens": []}  # fmt: skip
    bad = {"check": "engine", "dtype": "float16", "quantization": "fp8", "good": False, "error": "out of memory"}
    engines.write_text(json.dumps({"skipped": None, "library": "RTX 1", "device": "a GPU", "lines": [good, bad]}))
    report = make_report(tmp_path, checks, engines)
    assert "0 of 1 good; FAILED" in report
    assert "- NVLS: not run: one device\n" in report
    assert "- collective 'pt' in vLLM, against vLLM's own: not run: 1 GPU\n" in report
    assert "| 2 | pull | fp8 | 8192 | 3.25 | 4.5 |" in report
    assert "| float16 | none | 0.002 | 0.01 | 47 of 48 | good |" in report
    assert "| float16 | fp8 |  |  |  | FAILED out of memory |" in report
    assert json.loads((tmp_path / "cuda_fusion_gpu.json").read_text())["lines"] == lines[1:]
    engines.write_text(json.dumps({"skipped": "backend tensorrt: not installed", "lines": []}))
    assert "Not run: backend tensorrt: not installed." in make_report(tmp_path, checks, engines)
    engines.unlink()
    assert "FAILED: it ended before it wrote a result" in make_report(tmp_path, checks, engines)


def make_report(folder: Path, checks: Path, engines: Path) -> str:
    command = [sys.executable, str(ROOT / "scripts/gpu_report.py"), str(checks), str(folder)]
    texts = ["--sanitizers", "clean", "--nccl", "not run", "--vllm", "not run: 1 GPU", "--engines", str(engines)]
    subprocess.run([*command, *texts], check=True, timeout=240)
    return (folder / "cuda_fusion_gpu.md").read_text()
