"""Hugging Face folders: what their configurations mean, what is refused, and where the weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.checkpoint.sources import open_source
from pt_trtllm.checkpoint.sources.base import Source
from pt_trtllm.checkpoint.sources.llama import FAMILIES, HARMLESS, ROPE_KEYS, to_model_config
from pt_trtllm.checkpoint.spec import model_tensors
from pt_trtllm.config import ModelConfig, RopeScaling
from pt_trtllm.errors import CheckpointError, ConfigError
from pt_trtllm.testing.tiny_llama import TINY, TINY_MODELS, save_tiny_model

pytestmark = pytest.mark.unit

LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(family: str, **changes: Any) -> ModelConfig:
    return to_model_config({"model_type": family, **TINY, **changes})


# What a configuration means ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_take_the_defaults_of_the_configuration_class(family: str) -> None:
    from transformers import CONFIG_MAPPING

    ours, theirs = to_model_config({"model_type": family}), CONFIG_MAPPING[family]()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "bos_token_id", "pad_token_id"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", 128)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_id == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read_back(family: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[family](**TINY).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert to_model_config(written) == config_of(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_settings_of_transformers_are_no_obstacle(family: str) -> None:
    from transformers import GenerationConfig

    settings = {key for key in GenerationConfig._get_default_generation_params() if key in HARMLESS}
    assert config_of(family, **dict.fromkeys(settings, 1), _anything="private", unknown=None) == config_of(family)


def test_each_family_has_its_biases_and_norms() -> None:
    def features(config: ModelConfig) -> tuple[bool, bool, bool, str]:
        return config.attention_bias, config.attention_out_bias, config.mlp_bias, config.qk_norm

    assert features(config_of("llama")) == (False, False, False, "none")
    assert features(config_of("llama", attention_bias=True, mlp_bias=True)) == (True, True, True, "none")
    assert features(config_of("mistral")) == (False, False, False, "none")
    assert features(config_of("qwen2")) == (True, False, False, "none")
    assert features(config_of("qwen3")) == (False, False, False, "scaled")
    assert features(config_of("qwen3", attention_bias=True)) == (True, True, False, "scaled")
    assert config_of("qwen3").qk_norm_position == "before_rope"


def test_head_dim_is_given_or_follows_from_the_hidden_size() -> None:
    assert config_of("llama").head_dim == 6
    assert config_of("mistral", head_dim=None).head_dim == 6
    assert config_of("llama", head_dim=16).head_dim == 16
    assert config_of("qwen2", head_dim=16).head_dim == 16
    assert config_of("qwen3").head_dim == 128


def test_null_key_value_heads_mean_as_many_as_query_heads() -> None:
    assert [config_of(family, num_key_value_heads=None).num_kv_heads for family in FAMILIES] == [4] * 4


@pytest.mark.parametrize(
    ("given", "expected"), [(None, ()), (2, (2,)), ([2, 3], (2, 3)), (-1, ()), ([2, 40], (2,)), ([], ())]
)
def test_end_tokens_may_be_one_many_or_none(given: Any, expected: tuple[int, ...]) -> None:
    assert config_of("llama", eos_token_id=given).eos_token_id == expected


@pytest.mark.parametrize("token", [None, -1, 40])
def test_special_tokens_outside_the_vocabulary_are_none(token: int | None) -> None:
    config = config_of("llama", bos_token_id=token, pad_token_id=token)
    assert (config.bos_token_id, config.pad_token_id) == (None, None)


# Sliding windows -----------------------------------------------------------------------------------------------


def test_llama_attends_to_everything() -> None:
    assert config_of("llama", layer_types=["full_attention"] * 2).attention_pattern == ("global_rope",)


def test_mistral_slides_in_every_layer_and_the_window_excludes_the_current_token() -> None:
    config = config_of("mistral", sliding_window=4)
    assert (config.attention_pattern, config.attention_window) == (("local_rope",), 3)
    assert config_of("mistral").attention_window == 4095
    assert config_of("mistral", sliding_window=None).attention_pattern == ("global_rope",)
    assert config_of("mistral", sliding_window=1).attention_window == 0


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_slides_only_when_asked_and_from_a_certain_layer_on(family: str) -> None:
    window = {"sliding_window": 8, "num_hidden_layers": 4}
    assert config_of(family, **window).attention_pattern == ("global_rope",)
    config = config_of(family, **window, use_sliding_window=True, max_window_layers=3)
    assert config.attention_pattern == ("global_rope",) * 3 + ("local_rope",)
    assert config.attention_window == 7
    config = config_of(family, **window, use_sliding_window=True, max_window_layers=0)
    assert config.attention_pattern == ("local_rope",)
    config = config_of(family, **window, use_sliding_window=True, max_window_layers=4)
    assert config.attention_pattern == ("global_rope",)


def test_layer_types_of_qwen_go_before_max_window_layers() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = config_of(
        "qwen3", num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=4, layer_types=types
    )
    assert config.attention_pattern == ("local_rope", "global_rope") * 2


@pytest.mark.parametrize("window", [1, 4])
def test_windows_attend_to_the_tokens_that_transformers_attends_to(window: int) -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    attends, ours = sliding_window_causal_mask_function(window), config_of("mistral", sliding_window=window).window(0)
    assert ours is not None
    for query in range(12):
        for key in range(12):
            assert bool(attends(0, 0, torch.tensor(query), torch.tensor(key))) == (query - ours <= key <= query)


# Rotary positions ----------------------------------------------------------------------------------------------


def test_theta_is_read_from_both_spellings() -> None:
    assert config_of("llama", rope_theta=5e5).rope_theta == 5e5
    assert config_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope_theta == 5e5
    assert config_of("llama", rope_scaling=None).rope_scaling is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, RopeScaling(kind="linear", factor=2.0)),
        ({"rope_type": "llama3", **LLAMA3}, RopeScaling(kind="llama3", **LLAMA3)),
        ({"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
         RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)),
        ({"rope_type": "yarn", "factor": 4.0, "finetuned": True},
         RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=128)),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
         RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 0, "truncate": False,
          "attention_factor": 1.25, "mscale": 2.0, "mscale_all_dim": 1.0},
         RopeScaling(kind="yarn", factor=4.0, beta_fast=16, truncate=False, attention_factor=1.25,
                     original_max_position_embeddings=128)),
    ],
    ids=["linear", "llama3", "yarn", "yarn-finetuned", "yarn-ratio", "yarn-all-fields"],
)  # fmt: skip
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_scaling_is_read_from_both_spellings(spelling: str, fields: dict[str, Any], expected: RopeScaling) -> None:
    theta = {"rope_theta": 5e5}
    placed = {"rope_scaling": fields} | theta if spelling == "rope_scaling" else {"rope_parameters": fields | theta}
    config = config_of("llama", **placed)
    assert (config.rope_scaling, config.rope_theta) == (expected, 5e5)


def test_an_original_length_beside_the_block_counts_too() -> None:
    block = {"rope_type": "yarn", "factor": 4.0}
    scaling = config_of("qwen3", rope_scaling=block, original_max_position_embeddings=32).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 32


@pytest.mark.parametrize(
    "fields",
    [
        {"factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0},
        {"factor": 4.0, "mscale": 2.0},
        {"factor": 1.0, "mscale": 2.0, "mscale_all_dim": 1.0},
        {"factor": None, "original_max_position_embeddings": 32, "beta_fast": 0},
    ],
)
def test_yarn_tables_equal_those_of_transformers(fields: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from pt_trtllm.network.rope import rope_tables

    block = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **fields}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**TINY, head_dim=32, rope_parameters=dict(block)))
    want, _ = theirs(torch.zeros(1), torch.arange(128).unsqueeze(0))
    cos, _ = rope_tables(config_of("llama", head_dim=32, rope_parameters=block), 128)
    torch.testing.assert_close(cos, want[0, :, :16], rtol=0, atol=0)


PUBLISHED: dict[str, dict[str, Any]] = {
    # Shapes of configurations that are in wide use, as they were published
    "llama-3.1": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "smol-llama": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "vocab_size": 49152,
    },
    "mistral-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_understood(name: str) -> None:
    raw = PUBLISHED[name]
    config = to_model_config(raw)
    assert config.hidden_size == raw["hidden_size"]
    assert config.rope_theta == raw["rope_theta"]
    assert config.window(0) == (4095 if name == "mistral-v0.1" else None)


# What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma", {}, "model_type is 'gemma'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is silu"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "weights are quantised \\(awq\\)"),
        ("llama", {"auto_map": {"AutoModel": "code.Model"}}, "brings its own model code"),
        ("llama", {"final_logit_softcapping": 30.0, "residual_multiplier": 0.2},
         "final_logit_softcapping = 30.0, residual_multiplier = 0.2"),
        ("llama", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("llama", {"is_causal": False}, "is_causal = False"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "supported is the causal language model"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor differs from 1"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 24"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama", {"vocab_size": None}, "vocab_size is None"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ("llama", {"rope_theta": "10000"}, "rope_theta is '10000'"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window is in use"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "mistral does not support"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types is"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window is in use"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(family, **changes)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", 3])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_other_rotary_scalings_are_refused_with_what_is_supported(key: str, kind: Any) -> None:
    with pytest.raises(ConfigError, match=f"of type {kind!r}, supported are default, linear, llama3, yarn") as caught:
        config_of("llama", rope_scaling={key: kind, "factor": 2.0, "short_factor": [1.0]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "linear"}, "linear lacks factor"),
        ({"rope_type": "linear", "factor": None}, "factor = None, expected a number"),
        ({"rope_type": "linear", "factor": "2"}, "factor = '2', expected a number"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5, expected at least 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "unknown field beta_fast = 32"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "unknown field mrope_section"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks high_freq_factor.* lacks low_freq_factor"),
        ({"rope_type": "yarn", "factor": 8.0, "truncate": 1}, "truncate = 1, expected true or false"),
        ({"rope_type": "default", "type": "mrope"}, "rope_type of the rotary positions is given twice"),
        ({"full_attention": {"rope_type": "default"}}, "unknown field full_attention"),
        ([1], "rope_scaling is \\[1\\], expected an object"),
    ],
)
def test_malformed_rotary_scaling_is_refused(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of("llama", rope_scaling=fields)


def test_rotary_fields_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="rope_theta of the rotary positions is given twice"):
        config_of("llama", rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("llama", hidden_act="gelu", alibi=True, vocab_size=-3)
    assert all(word in str(caught.value) for word in ("gelu", "alibi = True", "vocab_size is -3"))


def test_no_key_is_both_harmless_and_meaningful_everywhere() -> None:
    meaningful = set.intersection(*(set(fields) for fields in FAMILIES.values())) | ROPE_KEYS
    assert not meaningful & HARMLESS


# Weights -------------------------------------------------------------------------------------------------------


def read_all(source: Source) -> dict[str, torch.Tensor]:
    tensors = {}
    for spec in model_tensors(source.config, separate_head=source.layout.separate_head):
        rows = torch.cat([block for _, block in source.blocks(spec, 0)])
        tensors[spec.name] = rows.reshape(spec.shape)
    return tensors


def expected_tensors(state: dict[str, torch.Tensor], num_layers: int, tied: bool) -> dict[str, torch.Tensor]:
    """The logical tensors of a Hugging Face state dict, spelled out independently of the code under test."""
    tensors = {
        "transformer.vocab_embedding.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
    }
    if not tied:
        tensors["lm_head.weight"] = state["lm_head.weight"]
    for layer_idx in range(num_layers):
        ours, theirs = f"transformer.layers.{layer_idx}.", f"model.layers.{layer_idx}."
        renamed = {
            "input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm",
            "attention.dense": "self_attn.o_proj", "attention.q_layernorm": "self_attn.q_norm",
            "attention.k_layernorm": "self_attn.k_norm", "mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        }  # fmt: skip
        for kind in ("weight", "bias"):
            for name, source_name in renamed.items():
                if f"{theirs}{source_name}.{kind}" in state:
                    tensors[f"{ours}{name}.{kind}"] = state[f"{theirs}{source_name}.{kind}"]
            if f"{theirs}self_attn.q_proj.{kind}" in state:
                tensors[f"{ours}attention.qkv.{kind}"] = torch.cat(
                    [state[f"{theirs}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                )
    return tensors


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tensor_of_a_saved_model_is_found(name: str, tmp_path: Path) -> None:
    family, changes = TINY_MODELS[name]
    state = save_tiny_model(tmp_path, family, changes)
    source = open_source(tmp_path)
    found, expected = read_all(source), expected_tensors(state, 2, source.config.tie_word_embeddings)
    assert found.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert torch.equal(found[tensor_name], tensor), tensor_name


def test_biases_that_the_family_does_not_have_are_noticed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", {"attention_bias": True})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj\.bias is unexpected"):
        open_source(tmp_path)


def test_end_tokens_of_the_generation_config_are_used(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen2", {})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}))
    config = open_source(tmp_path).config
    assert (config.eos_token_id, config.bos_token_id) == ((2, 7), 1)


def test_a_refusal_says_which_file_it_is_about(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY, "hidden_act": "relu"}))
    with pytest.raises(ConfigError, match=r"config\.json: llama model: hidden_act is 'relu'"):
        open_source(tmp_path)
