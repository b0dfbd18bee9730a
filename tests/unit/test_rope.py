"""Rotary positions against the implementations that models are trained with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pt_trtllm.config import ModelConfig, RopeScaling
from pt_trtllm.network.rope import apply_rope, rope_tables

pytestmark = pytest.mark.unit

NUM_POSITIONS = 600
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "linear": ("linear", {"factor": 3.0}),
    "llama3": ("llama3", LLAMA3),
    "yarn": ("yarn", YARN),
    "yarn-factor-1": ("yarn", YARN | {"factor": 1.0}),
    "yarn-attention-factor": ("yarn", YARN | {"attention_factor": 0.75}),
    "yarn-betas-not-truncated": ("yarn", YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    "yarn-step": ("yarn", YARN | {"original_max_position_embeddings": 2}),
}


def a_config(head_dim: int = 32, **changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, num_hidden_layers=1, hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim,
        intermediate_size=8, **changes,
    )  # fmt: skip


def rotary_module(theta: float, head_dim: int, kind: str, fields: dict[str, Any]) -> torch.nn.Module:
    pytest.importorskip("transformers", reason="needs the test extra")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": kind, "rope_theta": theta, **fields}
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=512, rope_parameters=parameters
    )
    module: torch.nn.Module = LlamaRotaryEmbedding(config)
    return module


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [4, 32, 128])
@pytest.mark.parametrize("case", CASES)
def test_tables_equal_those_of_transformers_bit_by_bit(case: str, head_dim: int, theta: float) -> None:
    kind, fields = CASES[case]
    scaling = None if kind == "default" else RopeScaling.from_dict({"kind": kind, **fields})
    cos, sin = rope_tables(a_config(head_dim, rope_theta=theta, rope_scaling=scaling), NUM_POSITIONS)
    want_cos, want_sin = rotary_module(theta, head_dim, kind, fields)(
        torch.zeros(1), torch.arange(NUM_POSITIONS).unsqueeze(0)
    )
    assert cos.shape == sin.shape == (NUM_POSITIONS, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, want_cos[0, :, : head_dim // 2], rtol=0, atol=0)
    torch.testing.assert_close(sin, want_sin[0, :, : head_dim // 2], rtol=0, atol=0)


@pytest.mark.parametrize("head_dim", [4, 16, 128])
def test_interleaved_tables_equal_those_of_the_reference_bit_by_bit(head_dim: int) -> None:
    from tamm.layers.rope import compute_rope_coefficients

    cos, sin = rope_tables(a_config(head_dim, rope_theta=500000.0, rope_style="interleaved"), NUM_POSITIONS)
    matrices = compute_rope_coefficients(positions=torch.arange(NUM_POSITIONS)[None], dim=head_dim, theta=500000.0)
    torch.testing.assert_close(cos, matrices[:, 0, :, 0, 0], rtol=0, atol=0)
    torch.testing.assert_close(sin, matrices[:, 0, :, 1, 0], rtol=0, atol=0)


def test_interleaved_rotation_equals_that_of_the_reference() -> None:
    from tamm.layers.rope import compute_rope_coefficients, rotate

    x = torch.randn(1, 40, 3, 16, generator=torch.Generator().manual_seed(0))
    matrices = compute_rope_coefficients(positions=torch.arange(40)[None], dim=16, theta=10000.0)
    cos, sin = rope_tables(a_config(16, rope_style="interleaved"), 40)
    want = rotate(x, rope_coefficients=matrices)
    torch.testing.assert_close(apply_rope(x, cos, sin, "interleaved"), want, rtol=1e-6, atol=1e-6)


def test_half_rotation_equals_that_of_transformers() -> None:
    pytest.importorskip("transformers", reason="needs the test extra")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(1, 40, 3, 32, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(a_config(32), 40)
    doubled = (torch.cat((table, table), dim=-1)[None] for table in (cos, sin))
    want, _ = apply_rotary_pos_emb(x, x, *doubled, unsqueeze_dim=2)
    torch.testing.assert_close(apply_rope(x, cos, sin, "half"), want, rtol=0, atol=0)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_a_head_of_two_features_turns_by_one_radian_per_position(style: str) -> None:
    cos, sin = rope_tables(a_config(2, rope_style=style), 5)
    turned = apply_rope(torch.tensor([1.0, 0.0]).expand(5, 1, 2), cos, sin, style)
    at = torch.arange(5.0)
    torch.testing.assert_close(turned[:, 0], torch.stack((at.cos(), at.sin()), dim=-1))


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotation_keeps_the_type_and_any_leading_axes(style: str) -> None:
    cos, sin = rope_tables(a_config(8, rope_style=style), 6)
    x = torch.randn(3, 6, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = apply_rope(x, cos, sin, style)
    assert turned.dtype == torch.bfloat16
    for track in range(3):
        assert torch.equal(turned[track], apply_rope(x[track].float(), cos, sin, style).bfloat16())


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_scores_depend_on_the_distance_only(style: str) -> None:
    cos, sin = rope_tables(a_config(16, rope_style=style), 30)
    query, key = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = [
        (apply_rope(query, cos[at : at + 1], sin[at : at + 1], style)
         * apply_rope(key, cos[at - 5 : at - 4], sin[at - 5 : at - 4], style)).sum()
        for at in (5, 17, 29)
    ]  # fmt: skip
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-5)
