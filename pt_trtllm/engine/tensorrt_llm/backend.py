"""`build --backend tensorrt-llm`: one engine per rank through TensorRT-LLM's own builder, on the machine's GPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.comm.base import Communicator
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits, EngineConfig, engine_file
from pt_trtllm.engine.tensorrt_llm.registration import register
from pt_trtllm.engine.tensorrt_llm.support import attention_windows, check_supported, runs_elsewhere
from pt_trtllm.engine.tensorrt_llm.weights import prepare_weights
from pt_trtllm.errors import ConfigError, EngineError


def settle(checkpoint: CheckpointConfig, limits: BuildLimits, options: BackendOptions) -> dict[str, Any]:
    """Raises, before any work, where the checkpoint or this machine stands in the way."""
    check_supported(checkpoint)
    if options.targets:
        raise ConfigError(
            f"--target {','.join(options.targets)}: backend tensorrt-llm builds for the GPU of this machine; "
            f"leave it out"
        )
    register()
    return {}


def build_ranks(
    checkpoint_dir: Path,
    manifest: dict[str, Any],
    config: EngineConfig,
    folder: Path,
    progress: Callable[[int, int], None],
    options: BackendOptions,
) -> dict[str, Any]:
    """Ranks are built one after another: each needs the GPU, and no engine needs another rank while it is built."""
    from tensorrt_llm.builder import build

    world_size = config.checkpoint.world_size
    for rank in range(world_size):
        progress(rank, world_size)
        engine = build(rank_model(checkpoint_dir, config, rank), build_config(config, options))
        if engine is None:
            raise EngineError(f"TensorRT-LLM built no engine for rank {rank}: its messages above say why")
        engine.save(str(folder))
        del engine
        gc.collect()  # an engine and its model hold GPU memory that the next rank needs
        if not (folder / engine_file(rank)).is_file():
            raise EngineError(f"TensorRT-LLM wrote no {engine_file(rank)} into {folder}")
    progress(world_size, world_size)
    return {}


def rank_model(checkpoint_dir: Path, config: EngineConfig, rank: int) -> Any:
    """One rank's model with its weights."""
    from tensorrt_llm.models.modeling_utils import PretrainedConfig

    from pt_trtllm.engine.tensorrt_llm.model import PTForCausalLM

    model_config = PretrainedConfig.from_checkpoint(str(checkpoint_dir))
    model_config.set_rank(rank)
    model_config.rope_positions = config.limits.max_seq_len
    hook = partial(prepare_weights, config=config.checkpoint)
    return PTForCausalLM.from_checkpoint(
        str(checkpoint_dir), rank=rank, config=model_config, preprocess_weights_hook=hook
    )


def build_config(config: EngineConfig, options: BackendOptions) -> Any:
    from tensorrt_llm.builder import BuildConfig

    limits = config.limits
    made = BuildConfig(
        max_batch_size=limits.max_batch_size,
        max_input_len=limits.max_input_len,
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
        gather_context_logits=options.gather_context_logits,
    )
    made.plugin_config.gemm_plugin = "auto"
    made.plugin_config.gemm_allreduce_plugin = None  # its row-parallel layers would sum without asking for a group
    return made


def engine_json(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """config.json: what TensorRT-LLM wrote and its C++ runtime reads, and what this project reads beside it.

    Windows are a run-time argument there: as defaults in the engine nobody can forget them.
    """
    written: dict[str, Any] = json.loads((folder / "config.json").read_text())
    windows = attention_windows(config.checkpoint.model, config.limits.max_seq_len)
    written["pretrained_config"]["runtime_defaults"] = {"max_attention_window": windows}
    ours = config.to_json()
    return {**written, "backend": ours["backend"], "limits": ours["build_config"]}


def open_engine(
    folder: Path, config: EngineConfig, comm: Communicator, num_blocks: tuple[int, ...], kv_cache_dtype: str = "auto"
) -> Any:
    raise runs_elsewhere(folder, config.checkpoint.world_size)
