"""The project's own layout (docs/checkpoints.md): Hugging Face style, every track spelled like a Llama.

`config.json` holds the fields of `ModelConfig` under their own names, `model_type` is "parallel_track".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pt_trtllm.checkpoint.artifact import read_json
from pt_trtllm.checkpoint.rank_files import ARCHITECTURE
from pt_trtllm.checkpoint.sources.base import Part, Source, SourceLayout, head_differs, open_store
from pt_trtllm.checkpoint.sources.tamm import split_layer_name
from pt_trtllm.checkpoint.spec import EMBEDDING, OUTPUT_NORM, OUTPUT_PROJECTION, TensorSpec, model_tensors
from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError

LayerPrefix = Callable[[int, int], str]
"""(layer, track) -> how the names of its tensors begin."""

MODEL_TYPE = "parallel_track"
DESCRIPTIVE = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version"}

TOP_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    OUTPUT_NORM: "model.norm.weight",
    OUTPUT_PROJECTION: "lm_head.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "attention.dense.weight": "self_attn.o_proj.weight",
    "attention.dense.bias": "self_attn.o_proj.bias",
    "attention_pre_residual_layernorm.weight": "attention_pre_residual_norm.weight",
    "attention_post_residual_layernorm.weight": "attention_post_norm.weight",
    "post_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.fc.weight": "mlp.gate_proj.weight",
    "mlp.fc.bias": "mlp.gate_proj.bias",
    "mlp.gate.weight": "mlp.up_proj.weight",
    "mlp.gate.bias": "mlp.up_proj.bias",
    "mlp.proj.weight": "mlp.down_proj.weight",
    "mlp.proj.bias": "mlp.down_proj.bias",
    "mlp.router.weight": "mlp.router.weight",
    "mlp_pre_residual_layernorm.weight": "mlp_pre_residual_norm.weight",
    "mlp_post_residual_layernorm.weight": "mlp_post_norm.weight",
}


def recognises(config: dict[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def open_source(folder: Path) -> Source:
    raw = read_json(folder / "config.json", 'a config with model_type "parallel_track"')
    if not recognises(raw):
        raise ConfigError(f"{folder / 'config.json'}: model_type is {raw.get('model_type')!r}, expected {MODEL_TYPE!r}")
    try:
        config = ModelConfig.from_dict({key: value for key, value in raw.items() if key not in DESCRIPTIVE})
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None
    return open_llama_like(folder, config, layer_prefix)


def layer_prefix(layer_idx: int, track_idx: int) -> str:
    return f"model.tracks.{track_idx}.layers.{layer_idx}."


def spelling(config: ModelConfig) -> Iterator[tuple[TensorSpec, int, Sequence[Part]]]:
    """(logical tensor, track, its parts in this layout) for the whole model: what tracks share, then track by track."""
    specs = model_tensors(config, separate_head=not config.tie_word_embeddings)
    places = [(spec, 0) for spec in specs if not spec.per_track]
    places += [(spec, track_idx) for track_idx in range(config.num_tracks) for spec in specs if spec.per_track]
    for spec, track_idx in places:
        yield spec, track_idx, locate(config, spec, track_idx, layer_prefix)


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that `open_source` reads back as `config`, with the keys that Hugging Face's tools look for."""
    ends = list(config.eos_token_id)
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "dtype": dtype,
        **config.to_dict(),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }


def open_llama_like(folder: Path, config: ModelConfig, prefix_of: LayerPrefix) -> Source:
    """A source whose layers are spelled as Llama's below `prefix_of(layer_idx, track_idx)`."""

    def find(spec: TensorSpec, track_idx: int) -> Sequence[Part]:
        return locate(config, spec, track_idx, prefix_of)

    store = open_store(folder)
    if config.tie_word_embeddings and head_differs(store, TOP_NAMES[EMBEDDING], TOP_NAMES[OUTPUT_PROJECTION]):
        config = replace(config, tie_word_embeddings=False)
    layout = SourceLayout(
        config=config,
        separate_head=not config.tie_word_embeddings,
        locate=find,
        ignored=lambda name: (
            name.endswith(".rotary_emb.inv_freq")
            or (config.tie_word_embeddings and name == TOP_NAMES[OUTPUT_PROJECTION])
        ),
    )
    return Source(folder, layout, store, model_tensors(config, separate_head=layout.separate_head))


def locate(config: ModelConfig, spec: TensorSpec, track_idx: int, prefix_of: LayerPrefix) -> Sequence[Part]:
    if spec.name in TOP_NAMES:
        return [Part(TOP_NAMES[spec.name], spec.rows)]
    layer_idx, name = split_layer_name(spec.name)
    prefix = prefix_of(layer_idx, track_idx)
    if name in ("dispatch_layernorm.weight", "combine_layernorm.weight"):
        segment = f"model.tracks.{track_idx}.segments.{layer_idx // config.interval}."
        return [Part(segment + name.replace("layernorm", "norm"), spec.rows)]
    if name in ("attention.qkv.weight", "attention.qkv.bias"):
        kind, dim = name.rpartition(".")[2], config.head_dim
        heads = {"q": config.num_attention_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        return [Part(f"{prefix}self_attn.{letter}_proj.{kind}", count * dim) for letter, count in heads.items()]
    if config.feed_forward_kind(layer_idx) == "sparse" and name in ("mlp.fc.weight", "mlp.proj.weight"):
        names = ("up_proj", "gate_proj") if name == "mlp.fc.weight" else ("down_proj",)
        return [
            Part(f"{prefix}mlp.experts.{expert}.{projection}.weight", spec.shape[1] // len(names))
            for expert in range(config.num_experts)
            for projection in names
        ]
    return [Part(prefix + LAYER_NAMES[name], spec.rows)]
