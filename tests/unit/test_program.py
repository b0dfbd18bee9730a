"""The compiled decoder against the same decoder over the PyTorch lowering, on ragged steps of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig, open_bundle
from pt_trtllm.engine.cpu import CpuEngine
from pt_trtllm.errors import EngineError
from pt_trtllm.network.decoder import pt_decoder
from pt_trtllm.network.kv_groups import KvGroup, kv_groups
from pt_trtllm.network.program.ops import Call, Embed, Linear, QkNormRope
from pt_trtllm.network.program.record import ProgramGraph
from pt_trtllm.network.step import SequenceSlice, StepBatch
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint
from pt_trtllm.testing.numeric import assert_close

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "num_tracks": 2,
    "sync_interval": 2,
    "max_position_embeddings": 128,
    "attention_window": 3,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "two tracks": {},
    "reference": {
        "attention_pattern": ("local_rope", "global_nope"),
        "rope_style": "interleaved",
        "qk_norm": "scaled",
        "qk_norm_position": "after_rope",
        "combine_norm": "pre_scale_rms_norm",
        "dispatch_norm": "rms_norm",
        "post_norm": "rms_norm",
        "combine_op": "sum",
    },
    "experts": {
        "feed_forward_pattern": ("dense", "sparse"),
        "moe_intermediate_size": 32,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "qk_norm": "unscaled",
        "pre_residual_norm": "rms_norm",
    },
    "llama with every bias": {
        "num_tracks": 1,
        "sync_interval": None,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": "scaled",
        "tie_word_embeddings": False,
    },
}
TOLERANCES = {"float32": 2e-6, "bfloat16": 2e-2}
"""One rounding less per SwiGLU and bias; otherwise the same operations."""


def groups_of(config: EngineConfig) -> tuple[KvGroup, ...]:
    return kv_groups(config.checkpoint.model, config.limits.max_seq_len)


@pytest.fixture
def open_engine(tmp_path: Path) -> Callable[..., CpuEngine]:
    def make(name: str = "two tracks", dtype: str = "float32", quantization: str = "none", **changes: Any) -> CpuEngine:
        if not (tmp_path / "engine").exists():
            write_big_checkpoint(tmp_path / "source", 0, ModelConfig(**BASE | CONFIGS[name] | changes))
            options = ConvertOptions(
                world_size=1, dtype=dtype, quantization=Quantization(method=quantization, group_size=32)
            )
            convert(tmp_path / "source", tmp_path / "checkpoint", options)
            limits = BuildLimits(max_batch_size=3, max_seq_len=128, max_num_tokens=128)
            build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions(limits=limits))
        config, _ = open_bundle(tmp_path / "engine")
        return CpuEngine(tmp_path / "engine", config, LocalCommunicator(), (12,) * len(groups_of(config)))

    return make


def step(*sequences: tuple[int, int, int]) -> StepBatch:
    """(slot, new tokens, past) each. A slot has four columns of its own; its tokens follow from slot and position."""
    tokens, slices = [], []
    for slot, count, past in sequences:
        tokens += [(7 * slot + 3 * position) % 97 for position in range(past, past + count)]
        blocks = () if past else (tuple(range(4 * slot, 4 * slot + 4)),)
        slices.append(SequenceSlice(slot=slot, num_tokens=count, past=past, blocks=blocks))
    return StepBatch.with_whole_rows(torch.tensor(tokens), tuple(slices), torch.arange(len(tokens)))


STEPS = (
    step((0, 5, 0), (2, 40, 0)),
    step((2, 1, 40), (0, 1, 5)),
    step((1, 9, 0), (0, 1, 6), (2, 6, 41)),
    step((1, 1, 9)),
)


def forward(engine: CpuEngine, batch: StepBatch) -> torch.Tensor:
    """Every group has its blocks in another order."""
    sequences = tuple(
        replace(
            piece, blocks=tuple(piece.blocks[0][i:] + piece.blocks[0][:i] for i in range(len(groups_of(engine.config))))
        )
        if piece.blocks
        else piece
        for piece in batch.sequences
    )
    logits = engine.forward(replace(batch, sequences=sequences))
    assert logits is not None
    return logits.whole_rows()


def logits_of(engine: CpuEngine, steps: Sequence[StepBatch], *, compiled: bool = True) -> list[torch.Tensor]:
    assert engine.program is not None
    if not compiled:
        engine.program = None
    return [forward(engine, batch) for batch in steps]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_pytorch_lowering(open_engine: Callable[..., CpuEngine], name: str, dtype: str) -> None:
    found = logits_of(open_engine(name, dtype), STEPS)
    expected = logits_of(open_engine(name, dtype), STEPS, compiled=False)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(one, other, TOLERANCES[dtype], f"{name} in {dtype}, step {index}")


@pytest.mark.parametrize("quantization", ["int8_wo", "int4_wo"])
def test_quantised_weights_too(open_engine: Callable[..., CpuEngine], quantization: str) -> None:
    found = logits_of(open_engine(quantization=quantization), STEPS)
    expected = logits_of(open_engine(quantization=quantization), STEPS, compiled=False)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, TOLERANCES["float32"], quantization)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_in_chunks(
    open_engine: Callable[..., CpuEngine], dtype: str
) -> None:
    together = logits_of(open_engine("reference", dtype), STEPS[:2])
    alone = logits_of(open_engine("reference", dtype), (step((2, 40, 0)), step((2, 1, 40))))
    in_chunks = logits_of(open_engine("reference", dtype), (step((2, 33, 0)), step((2, 8, 33))))
    assert torch.equal(torch.cat([together[0][5:], together[1][:1]]), torch.cat(alone))
    assert torch.equal(torch.cat(alone), torch.cat(in_chunks))


def test_a_pass_is_few_calls(open_engine: Callable[..., CpuEngine]) -> None:
    """Kernels between collectives are one list; projections of a SwiGLU, and norm and rotation, are one operation."""
    engine = open_engine("reference")
    config, mapping = engine.config.checkpoint.model, engine.mapping
    graph = ProgramGraph(engine.weights, mapping.tracks_per_rank)
    pt_decoder(graph, config, mapping)
    assert [op.name for op in graph.ops if isinstance(op, Call)] == ["track_fusion", "track_fusion", "logits"]
    kinds = [type(op) for op in graph.ops]
    assert kinds[0] is Embed
    assert kinds.count(QkNormRope) == config.num_hidden_layers
    assert kinds.count(Linear) == 4 * config.num_hidden_layers  # qkv, dense, gate and up, proj
    assert engine.program is not None
    assert engine.program.num_calls == 3 + 3


def test_what_has_no_kernel_takes_the_pytorch_lowering(open_engine: Callable[..., CpuEngine]) -> None:
    engine = open_engine(head_dim=24)
    assert engine.program is None
    assert torch.isfinite(forward(engine, STEPS[0])).all()


def test_steps_beyond_its_capacity_take_the_pytorch_lowering(open_engine: Callable[..., CpuEngine]) -> None:
    engine = open_engine()
    assert engine.program is not None
    assert engine.program.capacity == 63  # float32: from 64 rows on PyTorch's GEMM is ahead
    long = forward(engine, step((0, 90, 0)))
    assert_close(long[:40], forward(engine, step((0, 40, 0))), 1e-5, "the first 40 tokens")
    assert sum(engine.program.kernel_seconds().values()) > 0


def test_a_token_outside_the_vocabulary_is_refused(open_engine: Callable[..., CpuEngine]) -> None:
    engine = open_engine()
    good = step((0, 2, 0))
    bad = StepBatch.with_whole_rows(torch.tensor([3, 97]), good.sequences, good.logit_rows)
    with pytest.raises(EngineError, match="token 1 has id 97, expected 0 to 96"):
        engine.forward(bad)
