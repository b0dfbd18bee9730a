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
LONGEST_S = 240.0
"""Only ends a hang."""


class StartedCli:
    """`pt-trtllm ARGS...` while it runs. Use it in a `with` block: it ends there, asked first."""

    def __init__(self, *args: object, env: dict[str, str] | None = None) -> None:
        self._words = [*map(str, args)]
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        task = (self._words, {**os.environ, **(env or {})}, os.getcwd(), str(self._out), str(self._err))
        self._process = context.Process(target=_run, args=task)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = LONGEST_S) -> Completed:
        """What it printed and how it ended; never raises for a non-zero exit."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._words, timeout_s, self._out.read_bytes(), self._err.read_bytes())
        return Completed(self._words, self._process.exitcode, self._out.read_text(), self._err.read_text())

    def __enter__(self) -> StartedCli:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.poll() is None:  # its own ranks end with it
            self._process.terminate()
            self._process.join(LONGEST_S)
            self._process.kill()
        self._process.join()
        self._folder.cleanup()


def run_cli(*args: object, timeout_s: float = LONGEST_S, env: dict[str, str] | None = None) -> Completed:
    """`pt-trtllm ARGS...`; never raises for a non-zero exit."""
    with StartedCli(*args, env=env) as started:
        return started.wait(timeout_s)


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


def check_cli(*args: object, timeout_s: float = LONGEST_S, env: dict[str, str] | None = None) -> Completed:
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
