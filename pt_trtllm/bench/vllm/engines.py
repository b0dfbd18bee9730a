"""The models of a comparison: one checkpoint each, read by vLLM and, converted and built, by our own engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm.bench.shapes import Shape
from pt_trtllm.bench.vllm.checkpoints import write_llama, write_parallel_track
from pt_trtllm.bench.vllm.report import LLAMA
from pt_trtllm.bench.workload import Workload
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.config import ModelConfig, problems_to_error
from pt_trtllm.engine.build import BuildOptions, build


@dataclass(frozen=True, kw_only=True)
class SideOptions:
    shape: Shape
    world_size: int = 2
    """Ranks, and tracks of the PT models."""
    sync_intervals: tuple[int, ...] = (4, 8)
    eager: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 2:
            problems_to_error("shape", [f"world_size is {self.world_size}, expected at least 2: one rank never meets"])
        for sync_interval in self.sync_intervals:
            self.shape.config(self.world_size, sync_interval)  # raises what does not fit


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    config: ModelConfig
    checkpoint_dir: Path
    engine_dir: Path


def make_models(options: SideOptions, workload: Workload, folder: Path, check: Callable[[], None]) -> list[Model]:
    """The Llama first. `check` is called between steps; what it raises ends the work."""
    models = []
    for name, sync_interval in [(LLAMA, None), *((f"PT D={d}", d) for d in options.sync_intervals)]:
        check()
        base = folder / name.replace(" ", "-").replace("=", "")
        if sync_interval is None:
            config = write_llama(base / "checkpoint", options.shape)
        else:
            config = write_parallel_track(base / "checkpoint", options.shape, options.world_size, sync_interval)
        check()
        convert(base / "checkpoint", base / "converted", ConvertOptions(world_size=options.world_size))
        build(base / "converted", base / "engine", BuildOptions(limits=workload.build_limits()))
        models.append(Model(name=name, config=config, checkpoint_dir=base / "checkpoint", engine_dir=base / "engine"))
    return models
