"""A rank's weights as TensorRT reads them: mapped from the checkpoint, so that the only copy is the builder's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pt_trtllm.checkpoint.quantize import stored_name, stored_parts
from pt_trtllm.checkpoint.rank_files import CheckpointConfig, RankReader, rank_specs
from pt_trtllm.checkpoint.safetensors_io import read_header
from pt_trtllm.checkpoint.spec import TensorSpec

Parts = dict[str, torch.Tensor]
"""What a weight is stored as: 'weight', and for quantised ones its scales and zeros."""


class MappedWeights:
    """The tensors of one rank by name, with a leading axis of local tracks where they differ between tracks.

    Owns the mapping: constants of a network point into it, so it must live as long as the network does.
    """

    def __init__(self, checkpoint_dir: Path, config: CheckpointConfig, manifest: dict[str, Any], rank: int) -> None:
        reader = RankReader(checkpoint_dir, config, manifest, rank)  # checks the digest, and every name and shape
        path = checkpoint_dir / f"rank{rank}.safetensors"
        infos, _ = read_header(path)
        self.quantization = config.quantization
        self._storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        self._parts: dict[str, Parts] = {}
        for spec in rank_specs(config):
            shapes = reader.shapes(spec)
            self._parts[spec.name] = {
                suffix: self._view(infos[name].start, *shapes[suffix]) for suffix, name in _names(spec, config)
            }
        reader.close()

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> torch.Tensor:
        """A weight that is stored as it is."""
        return self._parts[name]["weight"]

    def parts(self, name: str) -> Parts:
        return self._parts[name]

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for parts in self._parts.values() for part in parts.values())

    def _view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        part = torch.empty(0, dtype=torch.uint8).set_(self._storage, start, (num_bytes,))  # type: ignore[call-overload]
        return part.view(dtype).view(shape)  # type: ignore[no-any-return]


def _names(spec: TensorSpec, config: CheckpointConfig) -> list[tuple[str, str]]:
    """(part, name in the file)"""
    parts = stored_parts(spec, config.torch_dtype, config.quantization)
    return [(part.suffix or "weight", stored_name(spec.name, part)) for part in parts]
