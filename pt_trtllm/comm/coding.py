"""How fused hidden states travel: as they are, or as codes of a few bits. The formats: plugins/src/codecs/README.md."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import torch

from pt_trtllm.comm.library import DTYPES, check, load_library
from pt_trtllm.errors import CommunicationError

CODECS = ("none", "int8", "fp8", "int4", "mxfp4")
ALGORITHMS = ("auto", "one_shot", "two_shot")


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What the ranks of a fusion agree on; the same on all of them."""

    codec: str = CODECS[0]
    delta: bool = False
    """Send what a segment changed instead of the hidden state itself."""
    algorithm: str = ALGORITHMS[0]
    """one_shot rounds values once, two_shot twice but sends fewer bytes; auto decides by size and number of ranks."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise CommunicationError(f"codec is {self.codec!r}, expected one of {list(CODECS)}")
        if self.algorithm not in ALGORITHMS:
            raise CommunicationError(f"algorithm is {self.algorithm!r}, expected one of {list(ALGORITHMS)}")
        if self.delta and self.codec == "none":
            raise CommunicationError("delta needs a codec: without one nothing is rounded")

    @property
    def codec_number(self) -> int:
        """pt_codec"""
        return CODECS.index(self.codec)

    @property
    def algorithm_number(self) -> int:
        """pt_algorithm"""
        return ALGORITHMS.index(self.algorithm)


NO_CODING = Coding()


def encoded_bytes(codec: str, rows: int, hidden: int) -> int:
    """Bytes that [rows, hidden] takes, scales included."""
    size: int = load_library().pt_codec_encoded_bytes(_number(codec), rows, hidden)
    return size


def encode(codec: str, x: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """x, or x - base, [rows, hidden] as uint8 [encoded_bytes]."""
    for name, tensor in (("x", x), ("base", base)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES or tensor.dim() != 2 or not tensor.is_contiguous() or not tensor.is_cpu:
            raise CommunicationError(
                f"encode: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected float32, bfloat16 "
                "or float16, two dimensions, contiguous on cpu"
            )
        if tensor.dtype != x.dtype or tensor.shape != x.shape:
            raise CommunicationError(f"encode: {name} is {tensor.dtype} {list(tensor.shape)}, x is {x.dtype}")
    library, (rows, hidden) = load_library(), x.shape
    encoded = torch.empty(encoded_bytes(codec, rows, hidden), dtype=torch.uint8)
    known = None if base is None else base.data_ptr()
    arguments = (x.data_ptr(), known, DTYPES[x.dtype], rows, hidden, encoded.data_ptr())
    check(library, library.pt_codec_encode(_number(codec), *arguments))
    return encoded


def decode(codec: str, encoded: torch.Tensor, rows: int, hidden: int) -> torch.Tensor:
    """The values of an encoded [rows, hidden], float32."""
    expected = encoded_bytes(codec, rows, hidden)
    if encoded.dtype != torch.uint8 or encoded.numel() != expected or not encoded.is_contiguous():
        raise CommunicationError(
            f"decode: encoded is {encoded.dtype} {list(encoded.shape)}, expected {expected} contiguous bytes of uint8"
        )
    library, values = load_library(), torch.empty(rows, hidden)
    check(library, library.pt_codec_decode(_number(codec), encoded.data_ptr(), rows, hidden, values.data_ptr()))
    return values


def _number(codec: str) -> int:
    if codec not in CODECS[1:]:
        raise CommunicationError(f"codec is {codec!r}, expected one of {list(CODECS[1:])}")
    return CODECS.index(codec)
