"""The GPU of this machine, asked of the driver directly: no CUDA package is needed to know that there is none."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute"""


@dataclass(frozen=True)
class Gpu:
    target: str
    """Its compute capability, like "sm90"."""
    memory_bytes: int


@functools.cache
def present_gpu() -> Gpu | None:
    """The first GPU the driver shows, or None."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if failed:
        return None
    return Gpu(f"sm{major.value}{minor.value}", memory.value)
