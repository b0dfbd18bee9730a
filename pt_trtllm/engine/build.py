"""Checkpoint -> engine folder, by whichever backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pt_trtllm.checkpoint.artifact import new_folder, write_json, write_manifest
from pt_trtllm.checkpoint.rank_files import open_checkpoint
from pt_trtllm.engine.bundle import KIND, BackendOptions, BuildLimits, EngineConfig
from pt_trtllm.engine.registry import backend_module

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    backend: str = "cpu"
    limits: BuildLimits = field(default_factory=BuildLimits)
    backend_options: BackendOptions = field(default_factory=BackendOptions)
    force: bool = False


def build(
    checkpoint_dir: Path, output_dir: Path, options: BuildOptions, progress: Progress = lambda done, total: None
) -> EngineConfig:
    """Writes an engine folder whole or not at all, and returns what its config.json says."""
    backend = backend_module(options.backend)
    checkpoint, manifest = open_checkpoint(checkpoint_dir)
    limits = options.limits.resolve(checkpoint.model.max_position_embeddings)
    config = EngineConfig(
        backend=options.backend,
        checkpoint=checkpoint,
        limits=limits,
        backend_config=backend.settle(checkpoint, limits, options.backend_options),
    )
    with new_folder(output_dir, source=checkpoint_dir, force=options.force) as folder:
        details = backend.build_ranks(checkpoint_dir, manifest, config, folder, progress, options.backend_options)
        if (checkpoint_dir / "tokenizer").is_dir():
            shutil.copytree(checkpoint_dir / "tokenizer", folder / "tokenizer")
        engine_json = getattr(backend, "engine_json", None)  # where another runtime reads config.json, too
        write_json(folder / "config.json", engine_json(config, folder) if engine_json else config.to_json())
        write_manifest(folder, KIND, {"backend": options.backend, "world_size": checkpoint.world_size, **details})
    return config
