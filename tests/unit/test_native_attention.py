"""Paged attention and the kernels around it, against plain float64 and against the PyTorch lowering's semantics."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pt_trtllm.errors import EngineError
from pt_trtllm.network import attention_library
from pt_trtllm.network.native_norm import rms_norm, swiglu
from pt_trtllm.network.paged_kv import PagedKvCache, RaggedBatch
from pt_trtllm.network.rope import apply_rope
from pt_trtllm.testing.kernels import qk_norm_rope_
from pt_trtllm.testing.numeric import assert_close

pytestmark = pytest.mark.unit

try:
    attention_library.isa()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)

TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Of the largest output: rounding it to the type, the rest is float32."""
FLOATS = list(TOLERANCES)


@dataclasses.dataclass
class Case:
    """Sequences of (past, new) tokens with all their keys and values, and the queries of the new ones."""

    sequences: list[tuple[int, int]]
    tracks: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block_tokens: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(self.tracks, tokens, heads, self.head_dim, generator=generator).to(self.dtype)

        self.keys = [draw(past + new, self.kv_heads) for past, new in self.sequences]
        self.values = [draw(past + new, self.kv_heads) for past, new in self.sequences]
        self.queries = [draw(new, self.heads) for _, new in self.sequences]
        columns = max(-(-(past + new) // self.block_tokens) for past, new in self.sequences)
        order = torch.randperm(columns * len(self.sequences), generator=generator, dtype=torch.int32)
        self.tables = order.view(len(self.sequences), columns)

    def cache(self, num_threads: int = 1) -> PagedKvCache:
        """Filled with NaN where the type has one: what nobody wrote must not be seen."""
        cache = PagedKvCache(
            num_layers=1, num_blocks=self.tables.numel(), num_tracks=self.tracks, num_kv_heads=self.kv_heads,
            head_dim=self.head_dim, block_tokens=self.block_tokens, dtype=self.cache_dtype or self.dtype,
            num_threads=num_threads,
        )  # fmt: skip
        for pool in cache.keys + cache.values + cache.key_scales + cache.value_scales:
            pool.fill_(math.nan if pool.is_floating_point() else 77)
        return cache

    def step(
        self, cache: PagedKvCache, pieces: list[tuple[int, int, int]], tables: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Writes and attends pieces (sequence, past, new) in one call; one output per piece."""
        chosen = (self.tables if tables is None else tables)[[s for s, _, _ in pieces]]
        batch = RaggedBatch([(new, past) for _, past, new in pieces], chosen)
        packed = [
            torch.cat([source[s][:, past : past + new] for s, past, new in pieces], dim=1)
            for source in (self.keys, self.values)
        ]
        # Queries are numbered from the first new token of their sequence; written-only pieces take any.
        query = torch.cat(
            [
                self.queries[s][:, past - self.sequences[s][0] :][:, :new]
                if past >= self.sequences[s][0]
                else torch.zeros(self.tracks, new, self.heads, self.head_dim, dtype=self.dtype)
                for s, past, new in pieces
            ],
            dim=1,
        )
        cache.write(0, batch, *packed)
        output = cache.attend(0, batch, query, window=self.window)
        return list(output.split([new for _, _, new in pieces], dim=1))

    def run(self, num_threads: int = 1) -> list[torch.Tensor]:
        """The past in one call, then all new tokens in one call."""
        cache = self.cache(num_threads)
        before = [(s, 0, past) for s, (past, _) in enumerate(self.sequences) if past]
        if before:
            self.step(cache, before)
        return self.step(cache, [(s, past, new) for s, (past, new) in enumerate(self.sequences)])

    def expected(self, s: int) -> torch.Tensor:
        past, new = self.sequences[s]
        query, key, value = (x[s].double().transpose(1, 2) for x in (self.queries, self.keys, self.values))
        key, value = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (key, value))
        at, seen = torch.arange(past, past + new)[:, None], torch.arange(past + new)[None, :]
        visible = seen <= at
        if self.window is not None:
            visible &= seen >= at - self.window
        scores = (query @ key.transpose(2, 3) / math.sqrt(self.head_dim)).masked_fill(~visible, -math.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


cases = st.builds(
    Case,
    sequences=st.lists(st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 2, 17, 64, 90])), min_size=1, max_size=4),
    tracks=st.integers(1, 2),
    heads=st.sampled_from([6, 12]),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    head_dim=st.sampled_from([16, 32, 80, 96, 128, 256]),
    block_tokens=st.sampled_from([16, 32, 48, 128]),
    window=st.sampled_from([None, 0, 1, 15, 64, 100]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)


@settings(max_examples=150)
@given(case=cases)
def test_ragged_batches_equal_the_float64_reference(case: Case) -> None:
    for s, output in enumerate(case.run()):
        assert_close(output, case.expected(s), TOLERANCES[case.dtype], f"sequence {s} of {case.sequences}")


@settings(max_examples=40)
@given(case=cases, data=st.data())
def test_chunks_batch_and_threads_do_not_change_a_bit(case: Case, data: st.DataObject) -> None:
    together = case.run()
    for s, (past, new) in enumerate(case.sequences):
        cache, at = case.cache(num_threads=2), 0
        pieces = []
        while at < past + new:
            limit = past + new if at >= past else past  # `step` wants chunks of past or of new tokens
            chunk = data.draw(st.integers(1, limit - at))
            output = case.step(cache, [(s, at, chunk)])[0]
            if at >= past:
                pieces.append(output)
            at += chunk
        assert torch.equal(torch.cat(pieces, dim=1), together[s])


def test_threads_do_not_change_a_bit_of_a_long_prompt() -> None:
    case = Case([(0, 300), (500, 1), (40, 200)], heads=8, kv_heads=4, head_dim=128, dtype=torch.bfloat16)
    for one, two in zip(case.run(1), case.run(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("window", [0, 10, 16, 40])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_blocks_before_the_window_are_never_read(window: int, dtype: torch.dtype) -> None:
    case = Case([(100, 1), (90, 30)], window=window, cache_dtype=dtype)
    want = case.run()
    cache, tables = case.cache(), case.tables.clone()
    case.step(cache, [(s, 0, past) for s, (past, _) in enumerate(case.sequences)])
    for s, (past, _) in enumerate(case.sequences):
        for column in range(max(0, past - window) // case.block_tokens):
            block = int(tables[s, column])
            for pool in cache.keys + cache.values + cache.key_scales + cache.value_scales:
                pool[block] = math.nan if pool.is_floating_point() else -128
            tables[s, column] = -1
    assert (tables == -1).any()
    found = case.step(cache, [(s, past, new) for s, (past, new) in enumerate(case.sequences)], tables)
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_int8_cache_stays_within_half_a_step_of_its_scales(head_dim: int, dtype: torch.dtype) -> None:
    case = Case([(0, 100)], head_dim=head_dim, dtype=dtype, cache_dtype=torch.int8)
    cache = case.cache()
    found = case.step(cache, [(0, 0, 100)])[0]
    blocks = case.tables[0].long()
    stored = dataclasses.replace(case)
    for pool, scales, source, read_back in (
        (cache.keys[0].transpose(3, 4), cache.key_scales[0], case.keys[0], stored.keys),
        (cache.values[0], cache.value_scales[0], case.values[0], stored.values),
    ):
        # [blocks, tracks, kv_heads, block_tokens, head_dim] to [tracks, tokens, kv_heads, head_dim]
        step = scales[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :100, :, None].double()
        read_back[0] = pool[blocks].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :100].double() * step
        assert torch.equal(step.float(), source.float().abs().amax(-1, keepdim=True) / 127)
        assert bool(((read_back[0] - source.double()).abs() <= 0.50001 * step).all())
    assert_close(found, stored.expected(0), TOLERANCES[dtype], "with the keys and values that were stored")
    assert_close(found, case.expected(0), 0.02, "with those that were given")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_cache_type_may_differ_from_the_activations(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    case = Case([(33, 5)], dtype=dtype, cache_dtype=cache_dtype)
    tolerance = max(TOLERANCES[dtype], 2 * TOLERANCES[cache_dtype])
    assert_close(case.run()[0], case.expected(0), tolerance, f"{dtype} in a cache of {cache_dtype}")


def test_slices_of_a_fused_projection_are_used_in_place() -> None:
    case = Case([(0, 20)])
    heads = (case.heads, case.kv_heads, case.kv_heads)
    qkv = torch.cat([case.queries[0], case.keys[0], case.values[0]], dim=2)
    query, key, value = qkv.flatten(2).unflatten(-1, (sum(heads), case.head_dim)).split(heads, dim=2)
    cache, batch = case.cache(), RaggedBatch([(20, 0)], case.tables)
    cache.write(0, batch, key, value)
    assert torch.equal(cache.attend(0, batch, query), case.run()[0])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_numbers_up_to_rounding(isa: str) -> None:
    program = (
        "import sys, torch\nfrom pt_trtllm.network import attention_library, paged_kv as n\n"
        "if attention_library.isa() != sys.argv[1]: raise SystemExit(3)\n"
        "torch.manual_seed(0)\nx = torch.randn(1, 70, 3, 48)\n"
        "c = n.PagedKvCache(num_layers=1, num_blocks=5, num_tracks=1, num_kv_heads=3, head_dim=48, dtype=x.dtype)\n"
        "b = n.RaggedBatch([(70, 0)], torch.arange(5, dtype=torch.int32)[None])\n"
        "c.write(0, b, x, x)\ny = c.attend(0, b, x).view_as(x).transpose(1, 2)\n"
        "z = x.transpose(1, 2)\nw = torch.nn.functional.scaled_dot_product_attention(z, z, z, is_causal=True)\n"
        "assert (y - w).abs().max() < 1e-5\n"
    )
    environment = os.environ | {"PT_KERNELS_ISA": isa}
    result = subprocess.run([sys.executable, "-c", program, isa], env=environment, capture_output=True, text=True)
    if "cannot run" in result.stderr or "this build has" in result.stderr:
        pytest.skip(f"this processor or build has no {isa}")
    assert result.returncode == 0, result.stderr


def reference_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, pre_scale: bool) -> torch.Tensor:
    """`TorchGraph.rms_norm` with weight [tracks, features]."""
    y = x.float()
    if weight is not None:
        weight = weight.float().view(weight.shape[0], *[1] * (x.dim() - 2), weight.shape[-1])
        y = y * weight if pre_scale else y
    y = functional.rms_norm(y, (y.shape[-1],), eps=eps)
    return (y if weight is None or pre_scale else y * weight).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["none", "post_scale", "pre_scale", "float32_weight", "one_weight", "repeated_x"])
@pytest.mark.parametrize("width", [1, 7, 256, 300, 2048])
def test_rms_norm_equals_the_torch_lowering(width: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, width).to(dtype)
    if kind == "repeated_x":
        x = x[:1].expand(3, 5, width)
    weight: torch.Tensor | None = torch.randn(3, width).to(torch.float32 if kind == "float32_weight" else dtype)
    if kind == "none":
        weight = None
    given = weight
    if kind == "one_weight" and weight is not None:
        given, weight = weight[0], weight[:1].expand(3, width)
    pre = kind == "pre_scale"
    found = rms_norm(x, given, eps=1e-5, pre_scale=pre)
    assert_close(found, reference_norm(x, weight, 1e-5, pre), TOLERANCES[dtype], f"rms_norm of {width}, {kind}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rope", [None, "interleaved", "half"])
@pytest.mark.parametrize("norm", [None, "before_rope", "after_rope"])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128])
def test_qk_norm_and_rope_equal_the_torch_lowering(
    head_dim: int, norm: str | None, rope: str | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    tracks, tokens, heads, kv_heads = 2, 9, 4, 2
    qkv = torch.randn(tracks, tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    weights = [torch.randn(tracks, head_dim).to(dtype), torch.randn(tracks, head_dim).to(dtype)]
    angles = torch.rand(50, head_dim // 2) * 6
    positions = torch.randint(0, 50, (tokens,))
    want = list(qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=2))
    for i, weight in enumerate(weights):
        if norm == "before_rope":
            want[i] = reference_norm(want[i], weight, 1e-6, False)
        if rope is not None:
            want[i] = apply_rope(want[i], angles[positions].cos(), angles[positions].sin(), rope)
        if norm == "after_rope":
            want[i] = reference_norm(want[i], weight, 1e-6, False)
    options: dict[str, Any] = {
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "norm": norm, "rope": rope, "eps": 1e-6,
        "query_weight": weights[0], "key_weight": weights[1],
    }  # fmt: skip
    cos, sin = angles.cos(), angles.sin()
    again = qk_norm_rope_(qkv.clone(), **options, cos=cos[positions], sin=sin[positions])
    found = qk_norm_rope_(qkv.clone(), **options, cos=cos, sin=sin, positions=positions)
    assert torch.equal(again, found)
    # Two roundings to the type, each half a step; a step apart where a sum lies close to a tie.
    tolerance = TOLERANCES[dtype] * (2 if dtype != torch.float32 else 1)
    assert_close(found, torch.cat(want, dim=2).flatten(2), tolerance, f"norm {norm}, rope {rope}")
    assert torch.equal(found[..., -kv_heads * head_dim :], qkv[..., -kv_heads * head_dim :]), "values were touched"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("width", [1, 255, 256, 1000])
def test_swiglu_equals_the_torch_lowering(width: int, gate_first: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = (torch.randn(2, 3, 2 * width) * 5).to(dtype)
    first, second = x.chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    found = swiglu(x, gate_first=gate_first)
    assert_close(found, functional.silu(gate) * up, TOLERANCES[dtype], f"swiglu of {width}")


def test_what_does_not_fit_is_refused_with_shapes() -> None:
    case = Case([(0, 5)])
    cache, batch = case.cache(), RaggedBatch([(5, 0)], case.tables)
    query, key = case.queries[0], case.keys[0]
    refusals: list[tuple[str, Any]] = [
        (r"key is float32 .*expected .*\[2, 5, 2, 32\]", lambda: cache.write(0, batch, query, key)),
        ("query is float64", lambda: cache.attend(0, batch, query.double())),
        ("heads and features contiguous", lambda: cache.attend(0, batch, query.repeat(1, 1, 1, 2)[..., ::2])),
        ("3 query heads, expected a multiple of the 2 key heads", lambda: cache.attend(0, batch, query[:, :, :3])),
        ("window is -3", lambda: cache.attend(0, batch, query, window=-3)),
        ("block_tables is int64", lambda: RaggedBatch([(5, 0)], case.tables.long())),
        ("reaches position 16, block 1", lambda: cache.attend(0, RaggedBatch([(5, 12)], case.tables), query)),
        (r"block_table\[0, 0\] is 9", lambda: cache.attend(0, RaggedBatch([(5, 0)], case.tables + 9), query)),
        ("head_dim is 24", lambda: dataclasses.replace(case, head_dim=24).cache()),
        ("KV cache of float64", lambda: dataclasses.replace(case, cache_dtype=torch.float64).cache()),
        (r"weight is float32 \[3\]", lambda: rms_norm(query.flatten(2), torch.ones(3), eps=1e-5)),
        ("features contiguous", lambda: swiglu(query.flatten(2).transpose(1, 2), gate_first=True)),
        ("qkv is", lambda: qk_norm_rope_(key.flatten(2), num_heads=3, num_kv_heads=1, head_dim=16)),
        ("token 0 is at position 7, but the tables have 5 rows", lambda: qk_norm_rope_(
            key.flatten(2), num_heads=2, num_kv_heads=1, head_dim=16, rope="half", cos=torch.ones(5, 8),
            sin=torch.ones(5, 8), positions=torch.full((5,), 7))),
    ]  # fmt: skip
    for message, call in refusals:
        with pytest.raises(EngineError, match=message):
            call()


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_ATTENTION_LIBRARY", "/nowhere/lib.so")
    with pytest.raises(EngineError, match="no such file"):
        attention_library.library_path()
    monkeypatch.delenv("PT_ATTENTION_LIBRARY")
    monkeypatch.setattr("pt_trtllm.__path__", ["/nowhere"])
    with pytest.raises(EngineError, match="cmake --build"):
        attention_library.library_path()
