"""The codecs against a reference of their own: NumPy, with the 8-bit and 4-bit types of ml_dtypes, byte by byte."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_trtllm.comm.coding import CODECS, Coding, decode, encode, encoded_bytes
from pt_trtllm.errors import CommunicationError

sys.path.insert(0, str(Path(__file__).parent))
from codec_reference import BITS, EXPONENTS, GROUP, any_values, reference_decode, reference_encode

pytestmark = pytest.mark.unit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SENTINEL = -0x80000000
ERROR_OF_LARGEST = {"int8": 0.51 / 127, "fp8": 1 / 16, "int4": 0.51 / 7, "mxfp4": 1 / 3.5}
"""Bound of an error, relative to the largest value of the group."""

codecs = pytest.mark.parametrize("codec", CODECS[1:])


@codecs
@settings(max_examples=60)
@given(
    rows=st.integers(0, 5),
    hidden=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    exponents=EXPONENTS,
    specials=st.booleans(),
    delta=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_and_values_are_those_of_the_reference(
    codec: str,
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    exponents: tuple[int, int],
    specials: bool,
    delta: bool,
    seed: int,
) -> None:
    x = any_values(rows, hidden, exponents, specials, seed).to(dtype)
    base = any_values(rows, hidden, exponents, specials, seed + 1).to(dtype) if delta else None
    message = encode(codec, x, base)
    expected = reference_encode(codec, (x.float() if base is None else x.float() - base.float()).numpy())
    assert message.numpy().tobytes() == expected
    assert not (message.view(torch.int32) == SENTINEL).any()
    values = decode(codec, message, rows, hidden)
    torch.testing.assert_close(
        values, torch.from_numpy(reference_decode(codec, expected, rows, hidden)), rtol=0, atol=0, equal_nan=True
    )


@codecs
def test_what_was_decoded_is_encoded_without_a_further_error(codec: str) -> None:
    once = decode(codec, encode(codec, torch.randn(7, 500)), 7, 500)
    twice = decode(codec, encode(codec, once), 7, 500)
    # The scale of what was rounded can differ by one step of bfloat16; powers of two are their own.
    tolerance = 0.0 if codec == "mxfp4" else 2**-7
    torch.testing.assert_close(twice, once, rtol=tolerance, atol=tolerance * float(once.abs().max()))


@codecs
@pytest.mark.parametrize("size", [1e-20, 1.0, 3e30])
def test_errors_are_bounded_by_the_largest_value_of_the_group(codec: str, size: float) -> None:
    hidden = 4 * GROUP[codec]
    x = torch.randn(50, hidden, generator=torch.Generator().manual_seed(3)) * size
    error = (decode(codec, encode(codec, x), 50, hidden) - x).view(-1, GROUP[codec])
    largest = x.view(-1, GROUP[codec]).abs().amax(1, keepdim=True)
    assert (error.abs() <= ERROR_OF_LARGEST[codec] * largest).all()


@codecs
def test_a_row_ends_its_last_group(codec: str) -> None:
    x = torch.randn(3, GROUP[codec] + 5, generator=torch.Generator().manual_seed(4))
    x[1] *= 1e6
    together = decode(codec, encode(codec, x), *x.shape)
    for row in range(3):
        assert torch.equal(decode(codec, encode(codec, x[row : row + 1]), 1, x.shape[1])[0], together[row])


@codecs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**126, -(2.0**127)])
def test_a_value_that_cannot_travel_makes_its_group_nan_and_no_other(codec: str, bad: float) -> None:
    x = torch.ones(1, 3 * GROUP[codec])
    x[0, GROUP[codec] + 2] = bad
    values = decode(codec, encode(codec, x), *x.shape)[0].view(3, -1)
    assert values[1].isnan().all()
    assert values[[0, 2]].isfinite().all()


@codecs
def test_zeros_and_what_is_as_good_as_zero_become_plus_zero(codec: str) -> None:
    x = torch.tensor([[0.0, -0.0, 2.0**-149, -(2.0**-101)] * 8])
    values = decode(codec, encode(codec, x), *x.shape)
    assert torch.equal(values.view(torch.int32), torch.zeros_like(values, dtype=torch.int32))


@codecs
def test_a_message_has_the_bits_its_format_says(codec: str) -> None:
    rows, hidden = 64, 4096
    assert encoded_bytes(codec, rows, hidden) * 8 / (rows * hidden) == BITS[codec]
    assert encoded_bytes(codec, 0, hidden) == 0


def test_unsuitable_arguments_are_refused_with_what_was_found() -> None:
    x = torch.ones(2, 64)
    with pytest.raises(CommunicationError, match="codec is 'int3', expected one of"):
        encode("int3", x)
    with pytest.raises(CommunicationError, match=r"encode: x is torch.float64 \[2, 64\] on cpu, expected float32"):
        encode("int8", x.double())
    with pytest.raises(CommunicationError, match=r"encode: base is torch.float32 \[1, 64\], x is torch.float32"):
        encode("int8", x, x[:1])
    with pytest.raises(CommunicationError, match=r"decode: encoded is torch.uint8 \[7\], expected 144 contiguous"):
        decode("int8", torch.zeros(7, dtype=torch.uint8), 2, 64)
    with pytest.raises(CommunicationError, match="algorithm is 'ring', expected one of"):
        Coding(codec="int8", algorithm="ring")
    with pytest.raises(CommunicationError, match="delta needs a codec"):
        Coding(delta=True)
