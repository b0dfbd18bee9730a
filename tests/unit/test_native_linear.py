"""The kernel library's products against float64, through the Python binding."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pt_trtllm.checkpoint.quantize import Quantization, dequantize, quantize_rows
from pt_trtllm.errors import EngineError
from pt_trtllm.network import native_linear
from pt_trtllm.network.native_linear import NativeLinear
from pt_trtllm.testing.kernels import linear_swiglu

pytestmark = pytest.mark.unit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
"""Largest error over the largest output: rounding of y, and for integer weights of x."""
KINDS = ["float", "int8", "int4-32", "int4-128"]


@pytest.fixture(autouse=True)
def library() -> None:
    try:
        native_linear.library_path()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_linear(
    kind: str, dtype: torch.dtype, out: int, columns: int, tracks: int = 2
) -> tuple[NativeLinear, torch.Tensor]:
    """A linear and its weights [tracks, out, in] in float64."""
    weight = torch.randn(tracks, out, columns, generator=torch.Generator().manual_seed(out + columns)) * 0.05
    if kind == "float":
        return NativeLinear(weight.to(dtype)), weight.to(dtype).double()
    method = "int8_wo" if kind == "int8" else "int4_wo"
    group_size = int(kind.partition("-")[2] or 128)
    quantization = Quantization(method=method, group_size=group_size)
    parts = [torch.stack(part) for part in zip(*(quantize_rows(w, dtype, quantization) for w in weight), strict=True)]
    if kind == "int8":
        scale = parts[1].flatten(1)
        return NativeLinear(parts[0], scale), dequantize({"weight": parts[0], "per_channel_scale": scale}).double()
    named = dict(zip(("weight", "weights_scaling_factor", "zero"), parts, strict=True))
    return NativeLinear(*parts), dequantize(named).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(13, 128), (50, 160), (7, 1152), (193, 2048)])
def test_equals_the_float64_product(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    out, columns = shape
    if kind == "int4-128" and columns % 128:
        columns = columns // 128 * 128
    linear, reference = make_linear(kind, dtype, out, columns)
    for rows in (1, 2, 3, 7, 16, 21):
        x = torch.randn(2, rows, columns).to(dtype)
        expected = x.double() @ reference.transpose(1, 2)
        y = linear(x)
        assert y.dtype == dtype
        error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
        assert error < TOLERANCE[dtype], f"{kind} {dtype} [{out}, {columns}] with {rows} rows: error {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_with_any_threads(kind: str, threads: None) -> None:
    linear, _ = make_linear(kind, torch.bfloat16, 230, 1152)
    x = torch.randn(2, 18, 1152).bfloat16()
    torch.set_num_threads(1)
    expected = linear(x)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for rows in range(1, 18):
            assert torch.equal(linear(x[:, 18 - rows :]), expected[:, 18 - rows :]), (
                f"{rows} rows, {num_threads} threads"
            )


ISA_PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_native_linear import KINDS, make_linear
x = torch.sin(torch.arange(2 * 3 * 1152)).view(2, 3, 1152)
torch.save([make_linear(kind, torch.float32, 40, 1152)[0](x) for kind in KINDS], sys.argv[2])
"""


def test_instruction_sets_agree_to_float32_rounding(tmp_path: Path) -> None:
    """Not to the bit: the order of the sum and fused multiply-add differ."""
    results = {}
    for name in ("baseline", "avx2", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", ISA_PROGRAM, str(Path(__file__).parent), str(tmp_path / name)],
            env={**os.environ, "PT_KERNELS_ISA": name},
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            results[name] = torch.load(tmp_path / name)
        else:
            assert "which this processor cannot run" in run.stderr or "this build has" in run.stderr, run.stderr
    for name, result in results.items():
        torch.testing.assert_close(result, results["baseline"], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_tracks_may_share_their_rows_and_rows_may_be_strided() -> None:
    linear, reference = make_linear("float", torch.float32, 9, 64)
    x = torch.randn(3, 64)
    expected = x.double() @ reference.transpose(1, 2)
    torch.testing.assert_close(linear(x.expand(2, 3, 64)).double(), expected, rtol=1e-4, atol=1e-5)
    wide = torch.randn(2, 3, 128)
    strided = wide[..., 64:]
    assert torch.equal(linear(strided), linear(strided.contiguous()))
    assert linear(x.new_empty(2, 0, 64)).shape == (2, 0, 9)


def test_bias_and_swiglu_are_added_before_the_rounding() -> None:
    gate, gate_weight = make_linear("int8", torch.bfloat16, 100, 96)
    up, up_weight = make_linear("int8", torch.bfloat16, 100, 96)
    x, bias = torch.randn(2, 5, 96).bfloat16(), torch.randn(2, 100).bfloat16()
    expected = x.double() @ gate_weight.transpose(1, 2) + bias.double()[:, None]
    torch.testing.assert_close(gate(x, bias).double(), expected, rtol=5e-3, atol=1e-3)
    hidden = torch.nn.functional.silu(x.double() @ gate_weight.transpose(1, 2)) * (
        x.double() @ up_weight.transpose(1, 2)
    )
    torch.testing.assert_close(linear_swiglu(gate, up, x).double(), hidden, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gives_the_weights_of_a_range(kind: str) -> None:
    linear, reference = make_linear(kind, torch.bfloat16, 21, 256)
    assert torch.equal(linear.dequantize(1, 4, 21, torch.float32), reference[1, 4:].float())
    assert torch.equal(linear.dequantize(0, 0, 5, torch.bfloat16), reference[0, :5].bfloat16())


def test_zero_rows_and_zero_scales_give_zeros() -> None:
    codes = torch.randint(-128, 128, (1, 5, 64), dtype=torch.int8)
    linear = NativeLinear(codes, torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]]))
    y = linear(torch.stack([torch.zeros(64), torch.ones(64)])[None])
    assert torch.equal(y[0, 0], torch.zeros(5))
    assert torch.equal(y[0, 1], codes[0].float().sum(dim=1) * torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))


def test_huge_page_copies_equal_their_source_and_outlive_their_views() -> None:
    source = torch.randn(3, 1000).bfloat16()
    copy = native_linear.copy_to_huge_pages(source)
    row = copy[1]
    del copy
    gc.collect()
    assert torch.equal(row, source[1])
    assert row.data_ptr() % 2 == 0


def test_bad_arguments_are_told_with_values() -> None:
    weight = torch.randn(1, 4, 64)
    linear = NativeLinear(weight)
    for call, message in (
        (lambda: linear(torch.randn(1, 2, 32)), r"x is torch.float32 \[1, 2, 32\]"),
        (lambda: linear(torch.randn(1, 2, 64).double()), "torch.float64"),
        (lambda: linear(torch.randn(1, 2, 64), torch.randn(1, 3)), "bias"),
        (lambda: NativeLinear(torch.randn(1, 4, 48)), "48 inputs"),
        (lambda: NativeLinear(torch.zeros(1, 4, 64, dtype=torch.int8)), "no scale"),
        (lambda: NativeLinear(weight, torch.ones(1, 4)), "scale"),
        (lambda: NativeLinear(torch.randn(1, 64, 4).transpose(1, 2)), "not dense"),
        (
            lambda: NativeLinear(
                torch.zeros(1, 4, 64, dtype=torch.uint8), torch.ones(1, 4, 2), torch.ones(1, 4, 2, dtype=torch.float16)
            ),
            "groups of 128 inputs|zero is",
        ),
        (lambda: linear.dequantize(0, 2, 5, torch.float32), "outputs 2 to 5 of 4"),
    ):
        with pytest.raises(EngineError, match=message):
            call()
