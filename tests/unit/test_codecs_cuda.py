"""The CUDA side of the codecs compiles for every architecture this project names, and links; running it takes a GPU."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pt_trtllm.comm.library import library_path

pytestmark = pytest.mark.unit

PLUGINS = Path(__file__).parents[2] / "plugins"
ARCHITECTURES = ("80", "90a", "100")


def test_device_codecs_compile_and_equal_the_host_where_there_is_a_gpu(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    library, program = library_path(), tmp_path / "codecs_on_device"
    command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'src'}"]
    codes = ",".join(f"sm_{name}" for name in ARCHITECTURES)
    command += [f"--generate-code=arch=compute_{ARCHITECTURES[0]},code=[{codes}]"]
    command += [str(PLUGINS / "src/codecs/device.cu"), str(PLUGINS / "tests/codecs_on_device.cu"), str(library)]
    command += ["-Xlinker", "-rpath", "-Xlinker", str(library.parent), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77:
        pytest.skip("compiled for sm_80, sm_90a and sm_100, not run: no CUDA device")
    assert done.returncode == 0, done.stdout + done.stderr
