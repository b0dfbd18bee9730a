"""Engines to compare, made on the spot: random weights, PT and tensor-parallel models of equal size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm.bench.random_engine import write_random_engine
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.config import ModelConfig, problems_to_error
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig

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
        vocab_size=6144, num_layers=8, hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64, intermediate_size=1280
    ),
    "medium": Shape(
        vocab_size=16000, num_layers=12, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=64,
        intermediate_size=2816,
    ),
    "large": Shape(
        vocab_size=32000, num_layers=16, hidden_size=2048, num_heads=16, num_kv_heads=8, head_dim=128,
        intermediate_size=5632,
    ),
}  # fmt: skip
"""tiny tries the benchmark out; small is 27 million parameters, medium 158, large 821. As one track: a Llama."""

MODELS = ("pt", "tp", "one")
"""Parallel tracks; one track over all ranks; one track on a single rank with all cores."""


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    shape: Shape
    models: tuple[str, ...] = ("pt", "tp")
    world_size: int = 2
    """Ranks, and tracks of the PT models."""
    sync_intervals: tuple[int, ...] = (4,)
    dtype: str = "bfloat16"
    quantizations: tuple[Quantization, ...] = (Quantization(),)

    def __post_init__(self) -> None:
        unknown = [model for model in self.models if model not in MODELS]
        if unknown or not self.models:
            problems_to_error("shape", [f"models are {list(self.models)}, expected some of {list(MODELS)}"])
        widened = sorted({quantization.method for quantization in self.quantizations if quantization.is_fp8})
        if widened:
            problems_to_error(
                "shape",
                [f"quantization is {', '.join(widened)}: the CPU engine widens fp8 weights, its reads say nothing"],
            )
        if self.world_size < 2 and self.models != ("one",):
            problems_to_error("shape", [f"world_size is {self.world_size}, expected at least 2: one rank never meets"])

    def checkpoints(self) -> dict[str, CheckpointConfig]:
        """By name: for every quantization the PT models, one per sync interval, then those of one track."""
        parts = {f"PT D={d}": (self.shape.config(self.world_size, d), self.world_size) for d in self.sync_intervals}
        found = parts if "pt" in self.models else {}
        for key, name, ranks in (("tp", "TP", self.world_size), ("one", "1 rank", 1)):
            if key in self.models:
                found[name] = self.shape.config(1, None), ranks
        return {
            self._name(name, quantization): CheckpointConfig(
                model=model, world_size=ranks, dtype=self.dtype, quantization=quantization
            )
            for quantization in self.quantizations
            for name, (model, ranks) in found.items()
        }

    def _name(self, model: str, quantization: Quantization) -> str:
        if len(self.quantizations) == 1:
            return model
        return f"{model} {self.dtype if quantization.method == 'none' else quantization.method}"


def make_engines(
    options: ShapeOptions, limits: BuildLimits, folder: Path, progress: Progress = lambda done, total: None
) -> Sequence[tuple[str, Path]]:
    """(name, engine folder) of every model.

    `progress` is called between tensors; what it raises ends the work, and nothing unfinished stays.
    """
    checkpoints = options.checkpoints()
    engines = []
    for index, (name, checkpoint) in enumerate(checkpoints.items()):

        def tick(done: int, total: int, index: int = index) -> None:
            progress(index, len(checkpoints))

        limits = limits.resolve(checkpoint.model.max_position_embeddings)
        write_random_engine(
            folder / f"engine{index}", EngineConfig(backend="cpu", checkpoint=checkpoint, limits=limits), tick
        )
        engines.append((name, folder / f"engine{index}"))
    progress(1, 1)
    return engines
