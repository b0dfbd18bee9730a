"""Fixtures that several test files share."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from pt_trtllm.processes import command_line, descendants, end_processes
from pt_trtllm.testing.cases import BASE
from pt_trtllm.testing.reference import build_model, save_checkpoint

# The models of the tests are tiny: a thread pool would only wait for itself, and for long on a busy machine.
torch.set_num_threads(1)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")

# A shell's background jobs ignore SIGINT, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Told to end, pytest still closes what its fixtures have opened.
signal.signal(signal.SIGTERM, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.default_int_handler)

# What loses its parent comes to this process.
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
PYTHONS_OWN = (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker")
"""They end with this process."""


def pytest_unconfigure() -> None:
    """Whatever ended the tests, nothing that they started lives on."""
    left = {pid: command_line(pid) for pid in descendants(os.getpid())}
    left = {pid: words for pid, words in left.items() if words and not any(own in words for own in PYTHONS_OWN)}
    for pid, words in left.items():
        print(f"left by the tests, and ended now: {pid} {words.replace(bytes(1), b' ').decode(errors='replace')[:200]}")
    end_processes(set(left))


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small random checkpoint in the reference's format; keyword arguments change its configuration."""

    def make(name: str = "source", **options: Any) -> Path:
        config = {**BASE, **options}
        save_checkpoint(build_model(config), config, tmp_path / name)
        return tmp_path / name

    return make
