"""The TensorRT backend as `engine.registry` wants one: settle what to build, build it, open it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pt_trtllm import env
from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits, EngineConfig, engine_file
from pt_trtllm.engine.memory import weight_bytes
from pt_trtllm.engine.tensorrt.bindings import bindings
from pt_trtllm.engine.tensorrt.gpu import present_gpu
from pt_trtllm.engine.tensorrt.pool import Pool, num_workers
from pt_trtllm.engine.tensorrt.settings import TensorrtSettings, check_fp8, choose_library
from pt_trtllm.errors import ConfigError

if TYPE_CHECKING:
    from pt_trtllm.comm.base import Communicator
    from pt_trtllm.engine.tensorrt.executor import TensorrtEngine


def settle(checkpoint: CheckpointConfig, limits: BuildLimits, options: BackendOptions) -> dict[str, Any]:
    """Chooses the package and the targets; raises, before any work, where this machine cannot build for them."""
    library, targets = choose_library(options.targets, present_gpu())
    if checkpoint.quantization.is_fp8:
        check_fp8(targets)
    settings = TensorrtSettings(
        library=library.name,
        version=library.version,
        targets=targets,
        gather_context_logits=options.gather_context_logits,
    )
    return settings.to_json(
        bindings(checkpoint.model, checkpoint.mapping, limits, checkpoint.dtype,
                 context_logits=options.gather_context_logits)
    )  # fmt: skip


def build_ranks(
    checkpoint_dir: Path,
    manifest: dict[str, Any],
    config: EngineConfig,
    folder: Path,
    progress: Callable[[int, int], None],
    options: BackendOptions,
) -> dict[str, Any]:
    """One serialized engine per rank; returns what the manifest says about them."""
    world_size, weights = config.checkpoint.world_size, weight_bytes(config.checkpoint)
    jobs = [
        {
            "checkpoint_dir": str(checkpoint_dir),
            "config": config.to_json(),
            "rank": rank,
            "output": str(folder / engine_file(rank)),
            "timing_cache": str(_timing_cache(config)),
            "weight_bytes": weights,
        }
        for rank in range(world_size)
    ]
    answers = Pool(progress, world_size).run(jobs, num_workers(options.workers, world_size, weights))
    return {"ranks": answers}


def open_engine(
    folder: Path, config: EngineConfig, comm: Communicator, num_blocks: tuple[int, ...], kv_cache_dtype: str = "auto"
) -> TensorrtEngine:
    """Loads this rank's engine on its GPU. The linear cache has its size from the build: `num_blocks` is not used."""
    if kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype is {kv_cache_dtype!r}; TensorRT engines keep keys and values in the type they were built "
            "for: leave it at auto"
        )
    from pt_trtllm.engine.tensorrt.executor import TensorrtEngine

    return TensorrtEngine.open(folder, config, comm)


def _timing_cache(config: EngineConfig) -> Path:
    """One file per package version and set of targets: TensorRT refuses a cache of another."""
    settings = config.backend_config
    key = f"{settings['library']}-{settings['version']}-{'-'.join(settings['targets'])}"
    return Path(env.CACHE_DIR.get()).expanduser() / "tensorrt" / f"{key}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
