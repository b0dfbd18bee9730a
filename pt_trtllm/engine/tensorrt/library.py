"""The TensorRT package of this machine: full TensorRT where it is installed, TensorRT-RTX otherwise.

Both have the same Python API. Full TensorRT builds for the GPU that is present; TensorRT-RTX builds for any of the
GPUs it knows, on machines without one.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from pt_trtllm.errors import EngineError

PACKAGES = ("tensorrt", "tensorrt_rtx")
"""In order of preference."""
INSTALL = (
    "pip install 'pt-trtllm[rtx]' (builds for RTX and Ampere GPUs, needs no GPU), or pip install 'pt-trtllm[tensorrt]' "
    "on a machine with the GPU to build for"
)


@dataclass(frozen=True)
class Library:
    """A TensorRT package, imported."""

    module: ModuleType
    name: str

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that can be named as targets ("sm89"); none where only the GPU present can be."""
        kinds = getattr(self.module, "ComputeCapability", None)
        return () if kinds is None else tuple(name.lower() for name in kinds.__members__ if name.startswith("SM"))

    def dtype(self, dtype: torch.dtype) -> Any:
        names = {
            torch.float32: "float32",
            torch.float16: "float16",
            torch.bfloat16: "bfloat16",
            torch.float8_e4m3fn: "fp8",
            torch.int8: "int8",
            torch.int32: "int32",
            torch.int64: "int64",
        }
        return getattr(self.module, names[dtype])


@functools.cache
def load_library(name: str | None = None) -> Library:
    """The package of that name, or the first one installed."""
    errors = []
    for candidate in PACKAGES if name is None else (name,):
        try:
            return Library(importlib.import_module(candidate), candidate)
        except ModuleNotFoundError as error:
            if error.name != candidate:
                errors.append(f"{candidate} is installed but cannot be used: {error}")
        except (ImportError, OSError, RuntimeError) as error:
            errors.append(f"{candidate} is installed but cannot be used: {error}")
    found = "; ".join(errors) or f"{' and '.join(PACKAGES) if name is None else name} not installed"
    raise EngineError(f"backend tensorrt: {found}; {INSTALL}")
