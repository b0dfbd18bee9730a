"""Backends by name; each is imported only when it is used."""

from __future__ import annotations

import importlib
from types import ModuleType

from pt_trtllm.errors import EngineError

BACKENDS = {
    "cpu": "pt_trtllm.engine.cpu",
    "tensorrt": "pt_trtllm.engine.tensorrt.backend",
    "tensorrt-llm": "pt_trtllm.engine.tensorrt_llm.backend",
}


def backend_module(name: str) -> ModuleType:
    """The module that builds and opens engines of a backend."""
    if name not in BACKENDS:
        raise EngineError(f"backend is {name!r}, expected one of {sorted(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])
