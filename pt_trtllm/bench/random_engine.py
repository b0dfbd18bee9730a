"""Engines of random weights, written at once: what convert and build would leave, without their input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from pt_trtllm.checkpoint.artifact import new_folder, write_json, write_manifest
from pt_trtllm.checkpoint.rank_files import part_shapes, rank_specs
from pt_trtllm.checkpoint.spec import TensorSpec
from pt_trtllm.engine import cpu
from pt_trtllm.engine.bundle import KIND, EngineConfig

BLOCK = 1 << 22
"""Random values that repeat: a processor's time depends on no single weight."""
STD = 0.02
INT8_STD, INT4_STD = 73.6, 4.6
"""Of codes that are all equally likely."""


def write_random_engine(target: Path, config: EngineConfig, progress: Callable[[int, int], None]) -> None:
    """An engine folder of the `cpu` backend. `progress` is called between tensors; what it raises ends the work."""
    checkpoint = config.checkpoint
    checkpoint.mapping.check_model(checkpoint.model)
    for spec in rank_specs(checkpoint):
        checkpoint.quantization.check(spec, checkpoint.mapping.tp_size)
    with new_folder(target, source=target.parent / "nothing") as folder:
        for rank in range(checkpoint.world_size):

            def tick(done: int, total: int, rank: int = rank) -> None:
                progress(rank * total + done, checkpoint.world_size * total)

            cpu.write_rank(folder, config, rank, RandomRank(config, rank), tick)
        write_json(folder / "config.json", config.to_json())
        write_manifest(folder, KIND, {"backend": config.backend, "world_size": checkpoint.world_size})


class RandomRank:
    """Implements `cpu.RankSource`: normal weights, codes without preference, norms of 1."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._checkpoint, self._mapping = config.checkpoint, config.mapping.for_rank(rank)
        random = torch.Generator().manual_seed(rank)
        self._normal = (torch.randn(BLOCK, generator=random) * STD).to(config.checkpoint.torch_dtype)
        self._codes = torch.randint(-127, 128, (BLOCK,), generator=random, dtype=torch.int8)

    def shapes(self, spec: TensorSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return part_shapes(spec, self._checkpoint, self._mapping)

    def read(self, spec: TensorSpec) -> dict[str, torch.Tensor]:
        return {part: self._values(spec, part, dtype, shape) for part, (dtype, shape) in self.shapes(spec).items()}

    def _values(self, spec: TensorSpec, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if part == "per_channel_scale":
            return torch.full(shape, STD / INT8_STD, dtype=dtype)
        if part == "weights_scaling_factor":
            return torch.full(shape, STD / INT4_STD, dtype=dtype)
        if part == "zero":
            return torch.zeros(shape, dtype=dtype)
        if len(spec.shape) == 1:
            return torch.ones(shape, dtype=dtype)
        block = self._normal if dtype.is_floating_point else self._codes.view(dtype)
        return block.repeat(-(-math.prod(shape) // BLOCK))[: math.prod(shape)].view(shape)
