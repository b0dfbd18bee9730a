"""Runs the command line the way a user does, in a process of its own.

Importing torch takes that process most of its time. So it is forked from a server that has imported everything before;
`test_cli.py` runs the installed command itself.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

Completed = subprocess.CompletedProcess[str]
COMMAND = "pt_trtllm.cli.main"
"""By name: commands use this folder, so it may not import them."""
PRELOADED = (COMMAND, "pt_trtllm.checkpoint.convert", "pt_trtllm.engine.cpu", "pt_trtllm.runtime.llm")


def run_cli(*args: object, timeout_s: float = 180.0, env: dict[str, str] | None = None) -> Completed:
    """`pt-trtllm ARGS...`; never raises for a non-zero exit."""
    words = [*map(str, args)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        variables = {**os.environ, **(env or {})}
        process = context.Process(target=_run, args=(words, variables, os.getcwd(), str(out), str(err)))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout_s, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run(words: Sequence[str], variables: dict[str, str], folder: str, out: str, err: str) -> None:
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["pt-trtllm", *words]
    importlib.import_module(COMMAND).main()


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
