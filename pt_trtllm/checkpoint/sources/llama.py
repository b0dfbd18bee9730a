"""Hugging Face folders of Llama, Mistral, Qwen2 and Qwen3 (dense): the case of one track.

Defaults and rules restate what each family's configuration class does with a field that is absent. A key that could
change the mathematics and is not understood is refused by name: converting must not quietly drop a feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pt_trtllm.checkpoint.artifact import read_json
from pt_trtllm.checkpoint.sources.base import Source
from pt_trtllm.checkpoint.sources.pt import open_llama_like
from pt_trtllm.config import (
    MAX_LAYERS,
    AttentionKind,
    ModelConfig,
    RopeScaling,
    as_token_ids,
    is_finite_number,
    is_positive_int,
    problems_to_error,
    shown,
)
from pt_trtllm.errors import ConfigError

_COMMON: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "layer_types": None,
}  # fmt: skip
_LLAMA_TOKENS = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {
    "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
# The fields of each family with their defaults; a family lacks the features whose fields it does not list.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | _LLAMA_TOKENS | {
        "intermediate_size": 11008, "max_position_embeddings": 2048, "num_key_value_heads": None,
        "attention_bias": False, "mlp_bias": False,
    },
    "mistral": _COMMON | _LLAMA_TOKENS | {
        "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "qwen2": _COMMON | _QWEN,
    "qwen3": _COMMON | _QWEN | {"attention_bias": False},
}  # fmt: skip
MODEL_TYPES = tuple(FAMILIES)

ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
HARMLESS = {
    # what the model is called and what it was made with
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path", "tokenizer_class",
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "prefix",
    "unsloth_version", "unsloth_fixed", "is_llama_config", "transformers.js_config",
    # training, and switches of other implementations
    "initializer_range", "attention_dropout", "hidden_dropout", "gradient_checkpointing", "neftune_noise_alpha",
    "pretraining_tp", "use_cache", "torchscript", "use_bfloat16", "tf_legacy_loss", "attn_implementation",
    "output_attentions", "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate",
    "is_decoder", "tie_last_hidden_states", "max_sequence_length", "model_max_length",
    # how to generate, which is asked per request
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "num_return_sequences", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "min_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sep_token_id", "decoder_start_token_id",
    # without effect where nothing else asks for them; biases must match the tensors that are found
    "original_max_position_embeddings", "max_window_layers", "attention_bias", "mlp_bias",
}  # fmt: skip
# Features that other models have, at the value that switches them off. Null switches off any of them.
NEUTRAL: dict[str, Any] = {
    "use_sliding_window": False, "is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False,
    "tie_encoder_decoder": False, "chunk_size_feed_forward": 0, "pruned_heads": {}, "quantization_config": {},
    "rope_interleaved": False, "use_mrope": False,
}  # fmt: skip

# Rotary scaling: the fields of each type, and those that must be there.
_YARN_OPTIONAL = {
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings",
}  # fmt: skip
_ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": ({"factor"}, _YARN_OPTIONAL | {"truncate", "finetuned"}),
}


def recognises(config: dict[str, Any]) -> bool:
    return config.get("model_type") in MODEL_TYPES


def open_source(folder: Path) -> Source:
    raw = read_json(folder / "config.json", "a Hugging Face model")
    generation = folder / "generation_config.json"
    if generation.is_file():  # it says when to stop, and often lists more end tokens than config.json
        tokens = read_json(generation, "a Hugging Face generation config")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        raw = raw | {name: tokens[name] for name in names if tokens.get(name) is not None}
    try:
        config = to_model_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None
    return open_llama_like(folder, config, lambda layer_idx, track_idx: f"model.layers.{layer_idx}.")


def to_model_config(raw: dict[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes; raises one ConfigError with everything that is not supported."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type is {family!r}, expected one of {list(MODEL_TYPES)}")
    values = FAMILIES[family] | {key: value for key, value in raw.items() if key in FAMILIES[family]}
    problems = _unsupported_features(family, raw, values) + _malformed_values(values)
    problems_to_error(f"{family} model", problems)  # what follows divides by these

    head_dim = _head_dim(family, values, problems)
    attention_pattern, attention_window = _attention(family, values, problems)
    rope_theta, rope_scaling = _rope(raw, values["max_position_embeddings"], problems)
    problems_to_error(f"{family} model", problems)
    bias = family == "qwen2" or values.get("attention_bias", False)
    return ModelConfig(
        vocab_size=values["vocab_size"],
        num_hidden_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        intermediate_size=values["intermediate_size"],
        max_position_embeddings=values["max_position_embeddings"],
        attention_pattern=attention_pattern,
        attention_window=attention_window,
        rope_theta=rope_theta,
        rope_style="half",
        rope_scaling=rope_scaling,
        qk_norm="scaled" if family == "qwen3" else "none",
        qk_norm_position="before_rope",
        rms_norm_eps=values["rms_norm_eps"],
        tie_word_embeddings=values["tie_word_embeddings"],
        attention_bias=bias,
        attention_out_bias=bias and family != "qwen2",
        mlp_bias=values.get("mlp_bias", False),
        bos_token_id=_token_id(values["bos_token_id"], values["vocab_size"]),
        eos_token_id=_end_token_ids(values["eos_token_id"], values["vocab_size"]),
        pad_token_id=_token_id(values["pad_token_id"], values["vocab_size"]),
    )


def _unsupported_features(family: str, raw: dict[str, Any], values: dict[str, Any]) -> list[str]:
    problems = []
    unknown = {
        key: value
        for key, value in raw.items()
        if not (key in FAMILIES[family] or key in ROPE_KEYS or key in HARMLESS or key.startswith("_"))
        and not (value is None or (key in NEUTRAL and value == NEUTRAL[key]))
    }
    if quantization := unknown.pop("quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        problems.append(
            f"quantization_config: the weights are quantised ({method}); give the unquantised checkpoint, "
            "converting can quantise it (--quantization)"
        )
    if unknown.pop("auto_map", None):
        problems.append(f"auto_map: the folder brings its own model code, only the standard {family} is supported")
    if unknown:
        listed = ", ".join(f"{key} = {value!r:.60}" for key, value in sorted(unknown.items()))
        problems.append(
            f"these keys may change what the model computes and are not supported: {listed}; "
            "remove one only if the model is the same without it"
        )
    if values["hidden_act"] not in ("silu", "swish"):
        problems.append(f"hidden_act is {values['hidden_act']!r}, supported is silu")
    architectures = raw.get("architectures")
    if architectures and f"{family}forcausallm" not in [str(name).lower() for name in architectures]:
        problems.append(f"architectures is {architectures!r}, supported is the causal language model of {family}")
    return problems


def _malformed_values(values: dict[str, Any]) -> list[str]:
    problems = []
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if not is_positive_int(values[key]) or (key == "num_hidden_layers" and values[key] > MAX_LAYERS):
            problems.append(f"{key} is {shown(values[key])}, expected a positive whole number")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if not isinstance(values.get(key, False), bool):
            problems.append(f"{key} is {values[key]!r}, expected true or false")
    return problems


def _head_dim(family: str, values: dict[str, Any], problems: list[str]) -> int:
    if values["head_dim"] is not None:
        return values["head_dim"]  # type: ignore[no-any-return]  # ModelConfig checks it
    if family == "qwen3":
        return 128
    head_dim, rest = divmod(values["hidden_size"], values["num_attention_heads"])
    if rest:
        problems.append(
            f"num_attention_heads {values['num_attention_heads']} does not divide hidden_size {values['hidden_size']}, "
            "and head_dim is not given"
        )
    return int(head_dim)


def _attention(family: str, values: dict[str, Any], problems: list[str]) -> tuple[tuple[AttentionKind, ...], int]:
    """Which layers attend locally, and how many tokens before the current one they see."""
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window is not None and not is_positive_int(window):
        problems.append(f"sliding_window is {window!r}, expected null or a positive whole number")
        window = None
    first_local = values.get("max_window_layers", 0)
    if window is not None and (not isinstance(first_local, int) or first_local < 0):
        problems.append(f"max_window_layers is {first_local!r}, expected a whole number")
        first_local = 0
    layers = range(values["num_hidden_layers"])
    local = [window is not None and layer_idx >= first_local for layer_idx in layers]
    if values["layer_types"] is not None:
        local = _local_layers(family, values["layer_types"], local, window is not None, problems)
    kinds: tuple[AttentionKind, ...] = tuple("local_rope" if is_local else "global_rope" for is_local in local)
    pattern = kinds if len(set(kinds)) > 1 else kinds[:1]
    # Hugging Face counts the current token as part of the window (it attends keys above query - window).
    return pattern, window - 1 if window is not None else 4096


def _local_layers(
    family: str, layer_types: Any, implied: list[bool], has_window: bool, problems: list[str]
) -> list[bool]:
    names = {"full_attention": False, "sliding_attention": True}
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) and kind in names for kind in layer_types):
        problems.append(f"layer_types is {layer_types!r:.120}, supported are lists of {list(names)}")
        return implied
    if len(layer_types) != len(implied):
        problems.append(f"layer_types has {len(layer_types)} entries, expected num_hidden_layers = {len(implied)}")
        return implied
    local = [names[kind] for kind in layer_types]
    if any(local) and not has_window:
        problems.append("layer_types asks for sliding_attention, but no sliding window is in use")
    elif not family.startswith("qwen") and local != implied:  # these classes treat all layers alike
        problems.append(f"layer_types differ between layers or from sliding_window, which {family} does not support")
    return local


def _rope(raw: dict[str, Any], max_position: int, problems: list[str]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from the old spelling (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`)."""
    given = _rope_fields(raw, problems)
    theta, kind = given.pop("rope_theta", 10000.0), given.pop("rope_type", "default")
    if given.pop("partial_rotary_factor", 1) != 1:
        problems.append("partial_rotary_factor differs from 1, rotating a part of each head is not supported")
    if not is_finite_number(theta) or theta <= 1:
        problems.append(f"rope_theta is {theta!r}, expected a number above 1")
        theta = 10000.0
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        problems.append(f"rope scaling is of type {kind!r}, supported are {', '.join(_ROPE_TYPES)}")
        return theta, None
    required, optional = _ROPE_TYPES[kind]
    if kind in ("llama3", "yarn"):
        original = given.setdefault("original_max_position_embeddings", max_position)
        if kind == "yarn" and given.get("factor", 0) is None and is_positive_int(original):
            given["factor"] = max_position / original
    flags = {key: given.pop(key) for key in ("truncate", "finetuned") if key in given and key in optional}
    found = [
        *(f"lacks {key}" for key in sorted(required - given.keys())),
        *(f"has the unknown field {key} = {given[key]!r:.60}" for key in sorted(given.keys() - required - optional)),
        *(f"has {key} = {value!r:.60}, expected a number" for key, value in given.items()
          if key in required | optional and not is_finite_number(value)),
        *(f"has {key} = {value!r:.60}, expected true or false" for key, value in flags.items()
          if not isinstance(value, bool)),
    ]  # fmt: skip
    problems += [f"rope scaling of type {kind} {problem}" for problem in found]
    if kind == "default" or found:
        return float(theta), None
    if kind == "yarn":
        _settle_yarn(given)
    try:
        return float(theta), RopeScaling.from_dict({"kind": kind, **given, "truncate": flags.get("truncate", True)})
    except ConfigError as error:
        problems.append(str(error))
        return float(theta), None


def _rope_fields(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """All rotary fields in one place; one that is given twice must be given alike."""
    fields: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        key = "rope_type" if key == "type" else key
        if value is None and key != "factor":  # yarn gives a factor of null a meaning
            return
        if key in fields and fields[key] != value:
            problems.append(f"{key} of the rotary positions is given twice, as {fields[key]!r} and {value!r}")
        fields.setdefault(key, value)

    for name in ("rope_parameters", "rope_scaling"):
        block = raw.get(name) or {}
        if not isinstance(block, dict):
            problems.append(f"{name} is {block!r:.60}, expected an object")
            continue
        for key, value in block.items():
            add(key, value)
    add("rope_theta", raw.get("rope_theta"))
    add("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if fields.get("rope_type") in ("llama3", "yarn"):
        add("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    return fields


def _settle_yarn(given: dict[str, Any]) -> None:
    """Replaces `mscale` and zeros, in Hugging Face's sense "not given", by the values they stand for."""
    scales = (given.pop("mscale", 0), given.pop("mscale_all_dim", 0))
    if "attention_factor" not in given and all(scales) and given["factor"] > 1:
        over, under = (0.1 * scale * math.log(given["factor"]) + 1.0 for scale in scales)
        given["attention_factor"] = over / under
    for key in ("beta_fast", "beta_slow"):
        if key in given and not given[key]:
            del given[key]


def _token_id(value: Any, vocab_size: int) -> Any:
    """Ids outside the vocabulary (-1 is common) mean that there is no such token."""
    return None if isinstance(value, int) and not 0 <= value < vocab_size else value


def _end_token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    listed: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    return as_token_ids([token for token in listed if _token_id(token, vocab_size) is not None])
