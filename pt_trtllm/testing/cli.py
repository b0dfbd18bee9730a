"""Runs the command line the way a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

Completed = subprocess.CompletedProcess[str]


def run_cli(*args: object, timeout_s: float = 180.0, env: dict[str, str] | None = None) -> Completed:
    """`pt-trtllm ARGS...`; never raises for a non-zero exit."""
    command = [sys.executable, "-m", "pt_trtllm.cli.main", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, **(env or {})}
    )


def check_cli(*args: object, timeout_s: float = 180.0, env: dict[str, str] | None = None) -> Completed:
    """`run_cli` that must succeed."""
    done = run_cli(*args, timeout_s=timeout_s, env=env)
    assert done.returncode == 0, f"pt-trtllm {args[0]} ended with {done.returncode}: {done.stderr[-3000:]}"
    return done


def refusal(*args: object, code: int = 2, env: dict[str, str] | None = None) -> str:
    """The one line with which the command line refuses bad input."""
    done = run_cli(*args, env=env)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == code, (
        f"pt-trtllm {args[0]} ended with {done.returncode}, expected {code}: {done.stderr[-3000:]}"
    )
    assert len(lines) == 1, f"expected one line, got: {done.stderr[-3000:]}"
    assert lines[0].startswith("pt-trtllm: error: "), lines[0]
    return lines[0]
