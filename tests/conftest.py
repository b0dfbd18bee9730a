"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

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


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small random checkpoint in the reference's format; keyword arguments change its configuration."""

    def make(name: str = "source", **options: Any) -> Path:
        config = {**BASE, **options}
        save_checkpoint(build_model(config), config, tmp_path / name)
        return tmp_path / name

    return make
