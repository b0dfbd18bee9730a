"""The configuration that vLLM and transformers see for `model_type: parallel_track`.

A `pt` folder counts heads per track. vLLM thinks in totals: it wants to divide heads over ranks and sizes its cache
from them. So this object shows totals, and keeps the folder's own description aside, whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from typing import Any

from transformers import PretrainedConfig

from pt_trtllm.checkpoint.rank_files import ARCHITECTURE
from pt_trtllm.checkpoint.sources.pt import MODEL_TYPE
from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.vllm import check_version, vllm_version

FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}


class ParallelTrackConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = MODEL_TYPE

    def __init__(self, parallel_track: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """From the fields of a `pt` folder's config.json, or from `parallel_track`, where `to_dict` has put them."""
        if "vllm" in sys.modules:  # here, because vLLM would only log what a plugin's `register` raises
            check_version(vllm_version())
        given = {key: kwargs.pop(key) for key in FIELDS & kwargs.keys()}
        kwargs.setdefault("architectures", [ARCHITECTURE])
        self.parallel_track: dict[str, Any] = {}
        if parallel_track is None and not given:
            super().__init__(**kwargs)  # transformers makes one without arguments to learn the defaults
            return
        _reject_misspelt(kwargs)
        model = ModelConfig.from_dict(given if parallel_track is None else parallel_track)
        super().__init__(**shown_to_vllm(model), **{key: kwargs[key] for key in kwargs if key not in HIDDEN})
        self.parallel_track = model.to_dict()

    @property
    def model(self) -> ModelConfig:
        """The description of one track and of how many there are."""
        return ModelConfig.from_dict(self.parallel_track)


def _reject_misspelt(others: dict[str, Any]) -> None:
    """transformers and vLLM put keys of their own beside ours, so only what resembles one of ours is an error."""
    known = FIELDS | set(PretrainedConfig().to_dict()) | HIDDEN
    for key in others.keys() - known:
        near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.85)
        if near:
            raise ConfigError(f"config.json: unknown key {key!r}; did you mean {near[0]!r}?")


HIDDEN = frozenset(("layer_types", "sliding_window", "max_position_embeddings"))
"""Derived again from the description, when an object is made from another one's `to_dict`."""


def shown_to_vllm(model: ModelConfig) -> dict[str, Any]:
    """What vLLM reads from a configuration. Nothing of positions: the model brings its own tables (rope.py), and
    vLLM would stretch the longest allowed sequence by a scaling that it found here."""
    windows = [model.window(layer_idx) for layer_idx in range(model.num_hidden_layers)]
    shown: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads * model.num_tracks,
        "num_key_value_heads": model.num_kv_heads * model.num_tracks,
        "head_dim": model.head_dim,
        "intermediate_size": (model.intermediate_size or model.moe_intermediate_size or 0) * model.num_tracks,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(model.eos_token_id) or None,
        "pad_token_id": model.pad_token_id,
    }
    if any(window is not None for window in windows):
        shown["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        shown["sliding_window"] = model.attention_window + 1  # vLLM counts the current token, too
    return shown
