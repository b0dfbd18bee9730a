"""An int8 KV cache: how many blocks fit, how far its logits are from the float cache's, and reuse of its blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig, open_bundle
from pt_trtllm.engine.cpu import CpuEngine
from pt_trtllm.errors import ConfigError, EngineError
from pt_trtllm.network.kv_cache import KV_CACHE_DTYPES, NativeKvCache, block_bytes, cache_type, make_cache
from pt_trtllm.network.kv_groups import KvGroup, kv_groups
from pt_trtllm.network.step import SequenceSlice, StepBatch
from pt_trtllm.runtime import options as runtime_options
from pt_trtllm.runtime.core import EngineCore
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.testing.numeric import relative_error

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
LIMITS = BuildLimits(max_seq_len=192, max_num_tokens=48)
"""Chunks stay below the number of rows from which PyTorch multiplies: every row has the same bits however computed."""
TOLERANCE = 0.03
"""Of the largest logit: half a step of 1/127 in every key and value, over all layers."""
PROMPT = tuple(5 + 7 * i % 90 for i in range(100))


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    convert(EXAMPLE, folder / "checkpoint", ConvertOptions(world_size=1, dtype="float32"))
    build(folder / "checkpoint", folder / "engine", BuildOptions(limits=LIMITS))
    return folder / "engine"


def config_of(engine_dir: Path) -> EngineConfig:
    return open_bundle(engine_dir)[0]


def open_engine(engine_dir: Path, kv_cache_dtype: str, num_blocks: int = 16) -> CpuEngine:
    config = config_of(engine_dir)
    return CpuEngine(engine_dir, config, LocalCommunicator(), (num_blocks,) * len(groups_of(config)), kv_cache_dtype)


def groups_of(config: EngineConfig) -> tuple[KvGroup, ...]:
    return kv_groups(config.checkpoint.model, config.limits.max_seq_len)


def logits_of(engine: CpuEngine, chunks: list[int]) -> torch.Tensor:
    """Of the whole prompt, computed in pieces."""
    rows, past = [], 0
    for count in chunks:
        piece = SequenceSlice(slot=0, num_tokens=count, past=past, blocks=() if past else ((3, 1, 2, 0), (0, 2, 3, 1)))
        ids = torch.tensor(PROMPT[past : past + count])
        logits = engine.forward(StepBatch.with_whole_rows(ids, (piece,), torch.arange(count)))
        assert logits is not None
        rows.append(logits.whole_rows())
        past += count
    return torch.cat(rows)


def test_logits_stay_near_those_of_the_float_cache(engine_dir: Path) -> None:
    chunks = [50, 49, 1]
    exact = logits_of(open_engine(engine_dir, "auto"), chunks)
    error = relative_error(logits_of(open_engine(engine_dir, "int8"), chunks), exact)
    assert 0 < error < TOLERANCE


def test_chunks_do_not_change_a_bit_of_them(engine_dir: Path) -> None:
    one, other = (logits_of(open_engine(engine_dir, "int8"), chunks) for chunks in ([48, 48, 4], [1, 32, 33, 34]))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_blocks_take_the_memory_they_are_counted_with(engine_dir: Path, kv_cache_dtype: str) -> None:
    engine = open_engine(engine_dir, kv_cache_dtype, num_blocks=3)
    assert isinstance(engine.cache, NativeKvCache)
    checkpoint = engine.config.checkpoint
    dtype = cache_type(kv_cache_dtype, checkpoint.torch_dtype)
    groups = groups_of(engine.config)
    assert [len(group.layers) for group in groups] == [1, 3]
    for group, paged in zip(groups, engine.cache.paged, strict=True):
        pools = [*paged.keys, *paged.values, *paged.key_scales, *paged.value_scales]
        counted = block_bytes(checkpoint.model, engine.mapping, dtype, group)
        assert sum(pool.nbytes for pool in pools) == 3 * counted


def test_more_blocks_fit_into_the_same_memory(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(engine_dir)
    head_dim = config.checkpoint.model.head_dim
    layers = range(config.checkpoint.model.num_hidden_layers)
    per_block = block_bytes(config.checkpoint.model, config.mapping, torch.float32, KvGroup(None, tuple(layers)))
    monkeypatch.setattr(runtime_options, "available_bytes", lambda: 2 * 5 * per_block)
    sizes = [RuntimeOptions(kv_cache_dtype=dtype).num_blocks(config) for dtype in KV_CACHE_DTYPES]
    more = 5 * 4 * head_dim // (head_dim + 4)
    assert sizes == [(5, 5), (more, more)]


def test_a_prompt_that_reuses_blocks_gets_the_same_answer(engine_dir: Path) -> None:
    options = RuntimeOptions(kv_cache_dtype="int8", max_tokens_in_paged_kv_cache=512)
    core = EngineCore(open_engine(engine_dir, "int8"), options)

    def answer() -> Sequence:
        sequence = core.add(Request(prompt_ids=PROMPT, params=SamplingParams(max_tokens=8, logprobs=2)))
        while core.has_work():
            core.step()
        return sequence

    first, second = answer(), answer()
    assert core.stats().reused_tokens == 96
    assert (second.output_ids, second.logprobs) == (first.output_ids, first.logprobs)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'int4', expected one of \['auto', 'int8'\]"):
        RuntimeOptions(kv_cache_dtype="int4")


def test_head_sizes_without_kernels_are_refused(engine_dir: Path) -> None:
    config = config_of(engine_dir)
    model = replace(config.checkpoint.model, head_dim=24)
    with pytest.raises(EngineError, match=r"kv_cache_dtype is int8, .* this model's is 24: use auto"):
        make_cache(model, config.mapping, num_blocks=(1, 1), num_slots=1, max_seq_len=32, dtype=torch.int8)
