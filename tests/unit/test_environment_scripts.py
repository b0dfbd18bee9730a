"""What scripts share that make environments: nothing of the user's is removed, and no machine's lack ends a shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SCRIPTS = Path(__file__).parents[2] / "scripts"
PYTHON = """#!/bin/sh
[ "$1" = -c ] || { mkdir -p "$3/bin" && touch "$3/bin/python"; }
"""
"""Stands for the one that makes an environment: `-c` asks for its version, else it is `-m venv FOLDER`."""
MAKE = 'set -euo pipefail; source "$1"; make_environment "$2" "$3" "${@:4}"'


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def make(python: Path, folder: Path, digest: str, *command: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", MAKE, "make", str(SCRIPTS / "environment.sh"), str(folder), digest, *command]
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_folder_of_the_users_own_is_not_removed(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "thesis").write_text("all of it")
    done = make(python, folder, "1", "true")
    assert done.returncode == 1
    assert f"{folder} exists and is no environment made here" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["thesis"]


def test_an_environment_is_made_once_and_again_where_it_was_not_finished(python: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "an environment", tmp_path / "log"
    folder.mkdir()  # an empty one is taken
    command = ("sh", "-c", f'echo made >> "{log}"')
    for digest, times in (("1", 1), ("1", 1), ("2", 2)):
        assert make(python, folder, digest, *command).returncode == 0
        assert log.read_text().count("made") == times
    assert make(python, folder, "3", "false").returncode == 1
    (folder / "leftover").touch()
    assert make(python, folder, "3", *command).returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == [".stamp", "bin"]


@pytest.mark.parametrize(
    ("ldconfig", "preloaded"),
    [
        (None, "/env/lib/libiomp5.so"),
        ("exit 1", "/env/lib/libiomp5.so"),
        (
            "awk 'BEGIN { for (i = 0; i < 50000; i++) print \"libtcmalloc_minimal.so.4 (libc6) => /lib/\" i }'",
            "/lib/0:/env/lib/libiomp5.so",
        ),
    ],
    ids=["none", "failing", "many lines"],
)
def test_whatever_ldconfig_says_a_strict_shell_goes_on(tmp_path: Path, ldconfig: str | None, preloaded: str) -> None:
    text = (SCRIPTS / "vllm_env.sh").read_text()
    function = text[text.index("_pt_vllm_export() {") : text.index("\n}\n") + 3]
    assert "/sbin/ldconfig" in function
    if ldconfig is not None:
        (tmp_path / "ldconfig").write_text(f"#!/bin/sh\n{ldconfig}\n")
        (tmp_path / "ldconfig").chmod(0o755)
    script = tmp_path / "script"
    exported = 'said="$LD_PRELOAD"; unset LD_PRELOAD; echo "$said"'  # echo alone: no process is to try and load it
    script.write_text(
        f"set -euo pipefail\n{function.replace('/sbin/ldconfig', '/no/such')}\n_pt_vllm_export /env\n{exported}\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{preloaded}\n"), done.stderr
