"""What vLLM is shown of a model, what it may not be asked for, and with which versions of it this works."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pt_trtllm.config import ModelConfig, RopeScaling
from pt_trtllm.errors import ConfigError
from pt_trtllm.vllm import NEWEST, OLDEST, check_version
from pt_trtllm.vllm.config import ParallelTrackConfig
from pt_trtllm.vllm.refusals import mapping_of

pytestmark = pytest.mark.unit

FIELDS: dict[str, Any] = {
    "vocab_size": 97, "num_hidden_layers": 4, "sync_interval": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "num_tracks": 4, "attention_window": 16,
    "attention_pattern": ("local_rope", "global_nope"),
}  # fmt: skip
MODEL = ModelConfig(**FIELDS)
SCALED = ModelConfig(**FIELDS, rope_scaling=RopeScaling(kind="linear", factor=4.0), eos_token_id=(2, 5))


def test_heads_are_counted_over_all_tracks() -> None:
    shown = ParallelTrackConfig(**MODEL.to_dict())
    assert (shown.num_attention_heads, shown.num_key_value_heads, shown.intermediate_size) == (16, 8, 384)
    assert (shown.hidden_size, shown.num_hidden_layers, shown.head_dim) == (64, 4, 32)
    assert shown.architectures == ["PTForCausalLM"]
    assert shown.model == MODEL


def test_windows_count_the_current_token() -> None:
    shown = ParallelTrackConfig(**MODEL.to_dict())
    assert shown.layer_types == ["sliding_attention", "full_attention"] * 2
    assert shown.sliding_window == 17
    everywhere = ParallelTrackConfig(**ModelConfig(**{**FIELDS, "attention_pattern": ("global_rope",)}).to_dict())
    assert getattr(everywhere, "sliding_window", None) is None


def test_positions_are_not_shown() -> None:
    shown = ParallelTrackConfig(**SCALED.to_dict()).to_dict()
    assert not any(key.startswith("rope") for key in shown)
    assert shown["max_position_embeddings"] == MODEL.max_position_embeddings


@pytest.mark.parametrize(("given", "expected"), [(None, None), (2, [2]), ([2, 5], [2, 5])])
def test_ends_of_text_are_a_list(given: Any, expected: Any) -> None:
    assert ParallelTrackConfig(**FIELDS, eos_token_id=given).eos_token_id == expected


@pytest.mark.parametrize("model", [MODEL, SCALED], ids=["plain", "scaled"])
def test_a_round_trip_multiplies_once(model: ModelConfig, tmp_path: Path) -> None:
    shown = ParallelTrackConfig(**model.to_dict())
    shown.save_pretrained(tmp_path)
    again = [
        ParallelTrackConfig.from_dict(shown.to_dict()),
        ParallelTrackConfig.from_dict(json.loads(json.dumps(shown.to_dict()))),
        ParallelTrackConfig.from_pretrained(tmp_path),
    ]
    for each in again:
        assert each.model == model
        assert each.to_dict() == {**shown.to_dict(), "transformers_version": each.to_dict().get("transformers_version")}


def test_transformers_makes_one_without_arguments() -> None:
    assert ParallelTrackConfig().model_type == "parallel_track"


def test_a_key_that_is_nearly_ours_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'attention_window'"):
        ParallelTrackConfig(**FIELDS, atention_window=3)


def asked(tensor_parallel_size: int = 2, **options: Any) -> SimpleNamespace:
    parallel = {key: value for key, value in options.items() if key not in ("speculative", "lora", "enable_sp", "hf")}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel_size, **parallel),
        speculative_config=SimpleNamespace(method=options["speculative"]) if "speculative" in options else None,
        lora_config=options.get("lora"),
        quant_config=None,
        additional_config={},
        model_config=SimpleNamespace(hf_overrides=options.get("hf", {})),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=options.get("enable_sp", False))),
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism (--pipeline-parallel-size)"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"enable_expert_parallel": True}, "expert parallelism (--enable-expert-parallel)"),
        ({"enable_eplb": True}, "load balancing of experts"),
        ({"speculative": "eagle3"}, "speculation by 'eagle3'"),
        ({"enable_sp": True}, "enable_sp"),
        ({"hf": {"rope_theta": 1e6, "max_position_embeddings": 64}}, "support rope_theta in --hf-overrides"),
        ({"tensor_parallel_size": 8, "lora": object()}, "LoRA with 8 ranks for 4 tracks"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_a_pt_model_cannot_do_is_refused_by_name(options: dict[str, Any], name: str) -> None:
    model = ModelConfig(**{**FIELDS, "num_key_value_heads": 4})
    with pytest.raises(ConfigError) as raised:
        mapping_of(model, asked(**options), 0)
    assert name in str(raised.value)


def test_refusals_are_said_together() -> None:
    with pytest.raises(ConfigError, match=r"pipeline parallelism .*; nor expert parallelism .*; nor speculation"):
        mapping_of(MODEL, asked(pipeline_parallel_size=2, enable_expert_parallel=True, speculative="medusa"), 0)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculation_that_reads_only_logits_is_served(method: str) -> None:
    assert mapping_of(MODEL, asked(speculative=method, pipeline_parallel_size=1), 1).local_tracks == range(2, 4)


@pytest.mark.parametrize(
    "overrides", [{"max_position_embeddings": 64, "architectures": ["PTForCausalLM"]}, lambda it: it]
)
def test_overrides_of_what_vllm_alone_reads_are_served(overrides: Any) -> None:
    mapping_of(MODEL, asked(hf=overrides), 0)


def test_a_number_of_ranks_that_does_not_fit_the_tracks_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match="possible here: 1, 2, 4, 8"):
        mapping_of(MODEL, asked(3), 0)


def test_a_track_that_cannot_be_split_that_far_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 attention heads"):
        mapping_of(MODEL, asked(32), 0)


@pytest.mark.parametrize("version", ["0.28.0", "0.32.0+cpu", "0.33.1rc2"])
def test_these_versions_are_served(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.27.1", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    assert (OLDEST, NEWEST) == ((0, 28), (0, 33))
    with pytest.raises(ConfigError, match=r"vLLM .* is installed; .* in vLLM 0\.28 to 0\.33"):
        check_version(version)
