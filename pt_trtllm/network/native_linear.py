"""Matrix products of a few rows by the kernel library (``plugins/src/linear``): they read weights at memory speed."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import functools
import weakref
from pathlib import Path

import torch

from pt_trtllm import env, native
from pt_trtllm.errors import EngineError

LIBRARY_NAME = "libpt_kernels.so"
MAX_ROWS = 16
"""More rows are right too, but read the weights again for every 16: a GEMM wins from a few dozen rows on."""

_ABI_VERSION = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {**_DTYPES, torch.int8: 3, torch.uint8: 4}
_INPUT_MULTIPLE = 32


class _Weight(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("out", ctypes.c_size_t),
        ("in_", ctypes.c_size_t),
        ("group_size", ctypes.c_size_t),
        ("kind", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
    )


class NativeLinear:
    """[tracks, tokens, in] -> [tracks, tokens, out], each track with its own weight; a `torch_linear.Linear`.

    The tensors stay as the checkpoint stores them (nothing is packed) and are kept alive, not copied: weight
    [tracks, out, in] float32, bfloat16 or float16; int8 with scale [tracks, out]; or uint8 [tracks, out, in / 2] (int4,
    even input in the low half) with scale and zero [tracks, out, groups]. Every track's part must be dense.

    A row's result does not depend on the other rows, their number, or the number of threads.
    """

    max_rows = MAX_ROWS

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
    ) -> None:
        self._library = load_library()
        self.weight, self.scale, self.zero = weight, scale, zero
        self.num_tracks, self.out_features, columns = _check_weight(weight)
        self.in_features = columns * 2 if weight.dtype == torch.uint8 else columns
        group_size, scale_dtype = _check_scales(self.in_features, weight, scale, zero)
        kind = _KINDS[weight.dtype]
        self._weights = [
            _Weight(
                weight[track].data_ptr(),
                None if scale is None else scale[track].data_ptr(),
                None if zero is None else zero[track].data_ptr(),
                self.out_features,
                self.in_features,
                group_size,
                kind,
                scale_dtype,
            )
            for track in range(self.num_tracks)
        ]
        self.pointers = [ctypes.addressof(struct) for struct in self._weights]
        """One `pt_linear_weight` per track."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """bias [tracks, out] of x's type."""
        x, track_bytes, dtype = self._check_input(x)
        y = x.new_empty((self.num_tracks, x.shape[1], self.out_features))
        bias_pointer, bias_bytes = None, 0
        if bias is not None:
            if bias.shape != (self.num_tracks, self.out_features) or bias.dtype != x.dtype or not bias.is_contiguous():
                expected = f"{x.dtype} [{self.num_tracks}, {self.out_features}]"
                raise EngineError(f"linear: bias is {bias.dtype} {list(bias.shape)}, expected dense {expected}")
            bias_pointer, bias_bytes = bias.data_ptr(), self.out_features * x.itemsize
        forward, rows, threads = self._library.pt_linear_forward, x.shape[1], torch.get_num_threads()
        x_pointer, y_pointer, y_bytes = x.data_ptr(), y.data_ptr(), rows * self.out_features * x.itemsize
        for track, weight in enumerate(self.pointers):
            at_bias = None if bias_pointer is None else bias_pointer + track * bias_bytes
            at_x, at_y = x_pointer + track * track_bytes, y_pointer + track * y_bytes
            status = forward(weight, at_x, at_bias, at_y, rows, dtype, threads)
            if status:
                _fail(self._library)
        return y

    def dequantize(self, track: int, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Weights of outputs first <= o < last as [last - first, in]: a GEMM's tile, the same numbers as here."""
        if dtype not in _DTYPES or not 0 <= first <= last <= self.out_features:
            raise EngineError(f"linear: cannot give outputs {first} to {last} of {self.out_features} as {dtype}")
        out = torch.empty((last - first, self.in_features), dtype=dtype)
        if self._library.pt_linear_dequantize(self.pointers[track], first, last, _DTYPES[dtype], out.data_ptr()):
            _fail(self._library)
        return out

    def _check_input(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """x with dense rows, the distance of its tracks in bytes (0 when they share one), its type's number."""
        dtype = _DTYPES.get(x.dtype)
        if dtype is None or x.dim() != 3 or x.shape[0] != self.num_tracks or x.shape[2] != self.in_features:
            raise EngineError(
                f"linear: x is {x.dtype} {list(x.shape)}, expected float32, bfloat16 or float16 "
                f"[{self.num_tracks}, tokens, {self.in_features}]"
            )
        if not x.is_cpu:
            raise EngineError(f"linear: x is on {x.device}, expected the CPU")
        track_stride, row_stride, stride = x.stride()
        if stride != 1 or (row_stride != self.in_features and x.shape[1] > 1):
            x = x.contiguous()
            track_stride = x.stride(0)
        return x, track_stride * x.itemsize, dtype


def supports(in_features: int) -> bool:
    """Whether the kernels take weights with this many inputs."""
    return in_features >= _INPUT_MULTIPLE and in_features % _INPUT_MULTIPLE == 0


def copy_to_huge_pages(values: torch.Tensor) -> torch.Tensor:
    """A copy in 2 MiB pages where the system grants them; the memory goes when the last view of it does."""
    library = load_library()
    if values.numel() == 0:
        return values.clone()
    pointer = ctypes.c_void_p()
    if library.pt_linear_huge_alloc(values.nbytes, ctypes.byref(pointer)):
        _fail(library)
    assert pointer.value is not None
    memory = (ctypes.c_ubyte * values.nbytes).from_address(pointer.value)
    weakref.finalize(memory, library.pt_linear_huge_free, pointer, values.nbytes).atexit = False
    copy = torch.frombuffer(memory, dtype=values.dtype).view(values.shape)
    return copy.copy_(values)


def _check_weight(weight: torch.Tensor) -> tuple[int, int, int]:
    if weight.dtype not in _KINDS or weight.dim() != 3 or not weight.is_cpu:
        raise EngineError(
            f"linear: weight is {weight.dtype} {list(weight.shape)} on {weight.device}, expected [tracks, out, in] of "
            f"{', '.join(map(str, _KINDS))} on the CPU"
        )
    _check_dense("weight", weight)
    return weight.shape[0], weight.shape[1], weight.shape[2]


def _check_scales(
    in_features: int, weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> tuple[int, int]:
    """(group size, number of the scales' type); what remains is checked by the library, where it is used."""
    leading = list(weight.shape[:2])
    if weight.dtype == torch.int8 and scale is not None and zero is None:
        group_size, shape = 0, leading
    elif weight.dtype == torch.uint8 and scale is not None and zero is not None:
        groups = scale.shape[-1] if scale.dim() == 3 else 0
        group_size, shape = in_features // groups if groups else 0, [*leading, groups]
        if group_size not in (32, 128) or group_size * groups != in_features:
            raise EngineError(f"linear: {groups} groups of {in_features} inputs, expected groups of 32 or 128")
    elif weight.is_floating_point() and scale is None and zero is None:
        group_size, shape = 0, leading
    else:
        given = [name for name, part in (("scale", scale), ("zero", zero)) if part is not None]
        raise EngineError(f"linear: {weight.dtype} weights with {given or 'no scale'}; int8 has scale, int4 also zero")
    for name, part in (("scale", scale), ("zero", zero)):
        if part is None:
            continue
        if list(part.shape) != shape or part.dtype not in _DTYPES or (scale is not None and part.dtype != scale.dtype):
            raise EngineError(f"linear: {name} is {part.dtype} {list(part.shape)}, expected one float type, {shape}")
        _check_dense(name, part)
    if not supports(in_features):
        raise EngineError(f"linear: {in_features} inputs, expected a multiple of {_INPUT_MULTIPLE}")
    return group_size, 0 if scale is None else _DTYPES[scale.dtype]


def _check_dense(name: str, part: torch.Tensor) -> None:
    if part.shape[0] and not part[0].is_contiguous():
        raise EngineError(f"linear: a track's {name} is not dense: strides {part.stride()} for {list(part.shape)}")


def library_path() -> Path:
    """Where this library is. Raises with how to build it."""
    return native.library_path(LIBRARY_NAME, env.KERNELS_LIBRARY, EngineError)


@functools.cache
def load_library() -> ctypes.CDLL:
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    signatures: native.Signatures = {
        "pt_linear_last_error": (ctypes.c_char_p, []),
        "pt_linear_abi_version": (number, []),
        "pt_linear_isa": (ctypes.c_char_p, []),
        "pt_linear_forward": (number, [pointer, pointer, pointer, pointer, size, number, number]),
        "pt_linear_swiglu": (number, [pointer, pointer, pointer, pointer, size, number, number]),
        "pt_linear_dequantize": (number, [pointer, size, size, number, pointer]),
        "pt_linear_huge_alloc": (number, [size, ctypes.POINTER(pointer)]),
        "pt_linear_huge_free": (None, [pointer, size]),
    }
    return native.load_library(library_path(), signatures, ("pt_linear_abi_version", _ABI_VERSION), EngineError)


def isa() -> str:
    """Instruction set of the kernels: baseline, avx2 or avx512."""
    library = load_library()
    name: bytes | None = library.pt_linear_isa()
    if name is None:
        _fail(library)
    assert name is not None
    return name.decode()


def _fail(library: ctypes.CDLL) -> None:
    raise EngineError(library.pt_linear_last_error().decode())
