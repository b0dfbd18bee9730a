"""The model's description: valid ones survive a round trip, invalid ones are refused with every reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pt_trtllm.config import ModelConfig, RopeScaling
from pt_trtllm.errors import ConfigError

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {
    "vocab_size": 32, "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "head_dim": 4,
    "intermediate_size": 24,
}  # fmt: skip


def test_a_config_survives_json() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
    config = ModelConfig(
        **SMALL, num_tracks=2, sync_interval=2, rope_scaling=scaling, eos_token_id=(2, 3), router_logits_cap=5.0,
        attention_pattern=("local_rope", "global_nope"),
    )  # fmt: skip
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_describe_a_llama() -> None:
    config = ModelConfig(**SMALL)
    assert (config.num_tracks, config.interval, config.num_kv_heads) == (1, 4, 4)
    assert config.window(0) is None
    assert config.uses_rope(3)


def test_patterns_repeat_over_the_layers() -> None:
    config = ModelConfig(**SMALL, attention_pattern=("local_rope", "local_rope", "global_nope"), attention_window=7)
    assert [config.window(i) for i in range(4)] == [7, 7, None, 7]
    assert [config.uses_rope(i) for i in range(4)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": "32"}, "vocab_size is '32'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"sync_interval": 3}, "sync_interval 3 does not divide num_hidden_layers 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"attention_pattern": ["global"]}, "attention_pattern is \\['global'\\]"),
        ({"attention_pattern": []}, "attention_pattern is \\[\\]"),
        ({"attention_pattern": "local_rope"}, "expected a list"),
        ({"attention_window": -1}, "attention_window is -1"),
        ({"feed_forward_pattern": ["moe"]}, "feed_forward_pattern is"),
        ({"feed_forward_pattern": ["sparse"]}, "num_experts is 0, needed by sparse"),
        ({"intermediate_size": None}, "intermediate_size is None, needed by dense"),
        ({"pre_norm": "layer_norm"}, "pre_norm is 'layer_norm'"),
        ({"combine_op": "max"}, "combine_op is 'max'"),
        ({"qk_norm": True}, "qk_norm is True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"bos_token_id": 32}, "bos_token_id is 32"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"rope_scaling": {"kind": "ntk", "factor": 2.0}}, "kind is 'ntk'"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0, "mscale": 1}}, "unknown keys \\['mscale'\\]"),
        ({"rope_scaling": {"kind": "linear", "factor": "2"}}, "factor is '2', expected a number"),
        ({"rope_scaling": {"kind": "linear", "factor": float("inf")}}, "factor is inf, expected a number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected null or an object"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"max_position_embeddings": 10**30}, "expected at most 16777216"),
        ({"colour": "red"}, "unknown keys \\['colour'\\]"),
    ],
)
def test_invalid_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**SMALL, **change})


def test_missing_values_are_all_named() -> None:
    with pytest.raises(ConfigError, match="missing keys \\['vocab_size', 'head_dim'\\]"):
        ModelConfig.from_dict({key: value for key, value in SMALL.items() if key not in ("vocab_size", "head_dim")})


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"combine_op.*rms_norm_eps"):
        ModelConfig.from_dict({**SMALL, "combine_op": "max", "rms_norm_eps": -1.0})
