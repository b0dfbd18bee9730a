"""Networks of whole worlds, recorded as they are made; needs a TensorRT package, no GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt_trtllm.checkpoint.rank_files import open_checkpoint
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig
from pt_trtllm.engine.tensorrt.library import load_library
from pt_trtllm.engine.tensorrt.messages import Messages, make_logger
from pt_trtllm.engine.tensorrt.network import RankNetwork, build_network
from pt_trtllm.engine.tensorrt.weights import MappedWeights

SMALL_LIMITS = BuildLimits(max_batch_size=4, max_seq_len=64, max_num_tokens=32)


@functools.cache
def quiet_builder() -> Any:
    """One per process: TensorRT keeps the first logger it is given."""
    library = load_library()
    return library.module.Builder(make_logger(library, Messages(lambda text: None)))


def engine_config(checkpoint_dir: Path, limits: BuildLimits = SMALL_LIMITS) -> EngineConfig:
    checkpoint, _ = open_checkpoint(checkpoint_dir)
    resolved = limits.resolve(checkpoint.model.max_position_embeddings)
    return EngineConfig(backend="tensorrt", checkpoint=checkpoint, limits=resolved)


def world_networks(checkpoint_dir: Path, *, context_logits: bool = True) -> list[RankNetwork]:
    """The network of every rank of a converted checkpoint."""
    config, (checkpoint, manifest) = engine_config(checkpoint_dir), open_checkpoint(checkpoint_dir)
    return [
        build_network(
            quiet_builder(),
            load_library(),
            config,
            MappedWeights(checkpoint_dir, checkpoint, manifest, rank),
            rank,
            context_logits=context_logits,
        )
        for rank in range(checkpoint.world_size)
    ]


@dataclass(frozen=True)
class RecordedCollective:
    """A call of `add_dist_collective`: a layer does not tell these again."""

    operation: str
    reduction: str
    group: tuple[int, ...]


def recording(calls: list[RecordedCollective], original: Callable[..., Any]) -> Callable[..., Any]:
    """`INetworkDefinition.add_dist_collective` that also notes its arguments."""

    def add(network: Any, tensor: Any, operation: Any, reduction: Any, root: int, groups: list[int]) -> Any:
        calls.append(RecordedCollective(operation.name, reduction.name, tuple(groups)))
        return original(network, tensor, operation, reduction, root, groups)

    return add
