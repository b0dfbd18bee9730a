"""What this backend can build, said before any work; and what a run needs besides the engine. No TensorRT-LLM here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError, EngineError

VERSION = "1.2"
INSTALL = (
    "run in NVIDIA's TensorRT-LLM 1.2.1 container, or install the extra 'pt-trtllm[tensorrt-llm]' from NVIDIA's "
    "package index on a Linux machine with a GPU and Python 3.12"
)


def require_tensorrt_llm() -> None:
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise EngineError(f"backend tensorrt-llm: the package tensorrt_llm is not installed here; {INSTALL}")


def runs_elsewhere(folder: Path, world_size: int) -> EngineError:
    """What to answer where somebody opens such an engine with this project's runtime."""
    return EngineError(
        f"{folder}: engines of backend tensorrt-llm run in TensorRT-LLM's own runtime: mpirun -n {world_size} "
        f"python -m pt_trtllm.engine.tensorrt_llm.generate --engine-dir {folder} --input-ids ..., "
        f"or Triton's tensorrtllm backend (docs/tensorrt-llm.md)"
    )


def check_supported(checkpoint: CheckpointConfig) -> None:
    """Raises one error with everything that stands in the way of a checkpoint."""
    model, mapping, problems = checkpoint.model, checkpoint.mapping, []
    if mapping.tracks_per_rank > 1:
        problems.append(
            f"{model.num_tracks} tracks on {mapping.world_size} ranks: its attention computes one track per rank; "
            f"convert with --world-size {model.num_tracks} or a multiple of it"
        )
    if checkpoint.quantization.method != "none":
        problems.append(
            f"quantization {checkpoint.quantization.method}: its kernels want a layout of their own, made at load from "
            f"float weights; convert with --quantization none"
        )
    if model.hidden_size % mapping.world_size:
        problems.append(
            f"hidden_size {model.hidden_size} is no multiple of {mapping.world_size} ranks, by which its runtime "
            f"divides; choose another world size"
        )
    if problems:
        raise ConfigError(f"backend tensorrt-llm cannot build this checkpoint: {'; '.join(problems)}")


def attention_windows(model: ModelConfig, max_seq_len: int) -> list[int]:
    """`max_attention_window` of every layer: how many tokens are seen, the current one among them."""
    windows = [model.window(layer_idx) for layer_idx in range(model.num_hidden_layers)]
    return [max_seq_len if window is None else min(window + 1, max_seq_len) for window in windows]


def rotates_itself(model: ModelConfig, layer_idx: int) -> bool:
    """Whether queries and keys are rotated by the model, not by the attention plugin, which rotates before anything
    else can happen: norms that follow the rotation, and the scalings whose details the plugin would decide."""
    norm_follows = model.qk_norm != "none" and model.qk_norm_position == "after_rope"
    return model.uses_rope(layer_idx) and (norm_follows or model.rope_scaling is not None)


def changes_queries_and_keys(model: ModelConfig, layer_idx: int) -> bool:
    """Whether anything happens to queries and keys between the projection and the attention plugin."""
    return model.qk_norm != "none" or rotates_itself(model, layer_idx)
