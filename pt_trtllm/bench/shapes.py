"""Engines to compare, made on the spot: random weights, PT and tensor-parallel models of equal size."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.config import ModelConfig, problems_to_error
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads and widths are those of all tracks together: each of n tracks has an n-th of them."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    def config(self, num_tracks: int, sync_interval: int | None) -> ModelConfig:
        """n = 1 is the tensor-parallel model: its layers are as wide as the tracks together."""
        problems = [
            f"{getattr(self, name)} {what}"
            for name, what in (
                ("num_heads", "attention heads"),
                ("num_kv_heads", "key/value heads"),
                ("intermediate_size", "intermediate features"),
            )
            if getattr(self, name) % num_tracks
        ]
        problems_to_error(f"this shape cannot be divided into {num_tracks} tracks", problems)
        return ModelConfig(
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads // num_tracks,
            num_key_value_heads=self.num_kv_heads // num_tracks,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size // num_tracks,
            num_tracks=num_tracks,
            sync_interval=sync_interval,
            tie_word_embeddings=True,
        )


SHAPES = {
    "tiny": Shape(
        vocab_size=256, num_layers=8, hidden_size=64, num_heads=8, num_kv_heads=8, head_dim=16, intermediate_size=128
    ),
    "small": Shape(
        vocab_size=8192, num_layers=8, hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64, intermediate_size=2048
    ),
    "large": Shape(
        vocab_size=32768, num_layers=16, hidden_size=2048, num_heads=16, num_kv_heads=8, head_dim=128,
        intermediate_size=8192,
    ),
}  # fmt: skip
"""tiny tries the benchmark out; small is 38 million parameters, large about 1.1 billion."""


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    shape: Shape
    world_size: int = 2
    """Ranks, and tracks of the PT models."""
    sync_intervals: tuple[int, ...] = (4,)
    dtype: str = "bfloat16"
    quantization: Quantization = field(default_factory=Quantization)

    def __post_init__(self) -> None:
        if self.world_size < 2:
            problems_to_error("shape", [f"world_size is {self.world_size}, expected at least 2: one rank never meets"])

    def models(self) -> dict[str, ModelConfig]:
        """PT models, one per sync interval, then the tensor-parallel one."""
        pt = {f"PT D={d}": self.shape.config(self.world_size, d) for d in self.sync_intervals}
        return {**pt, "TP": self.shape.config(1, None)}


def make_engines(
    options: ShapeOptions, limits: BuildLimits, folder: Path, progress: Progress = lambda done, total: None
) -> Sequence[tuple[str, Path]]:
    """(name, engine folder) of every model; checkpoints are gone again when it returns.

    `progress` is called between tensors; what it raises ends the work, and nothing unfinished stays.
    """
    models = options.models()
    engines = []
    for index, (name, model) in enumerate(models.items()):
        work, engine = folder / f"work{index}", folder / f"engine{index}"

        def tick(done: int, total: int, index: int = index) -> None:
            progress(index, len(models))

        tick(0, 1)
        write_big_checkpoint(work / "source", 0, model)
        converting = ConvertOptions(
            world_size=options.world_size, dtype=options.dtype, quantization=options.quantization
        )
        convert(work / "source", work / "checkpoint", converting, tick)
        build(work / "checkpoint", engine, BuildOptions(limits=limits), tick)
        shutil.rmtree(work)
        engines.append((name, engine))
    progress(1, 1)
    return engines
