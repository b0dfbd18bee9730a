"""The TensorRT backend's networks of all ranks, computed by the evaluator: sequences in, logits out.

Prompts are computed in chunks, one sequence at a time, with its rows of the caches bound; then all sequences of a batch
decode together, one token each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.checkpoint.rank_files import open_checkpoint
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig
from pt_trtllm.engine.tensorrt.bindings import cache_capacity
from pt_trtllm.engine.tensorrt.library import load_library
from pt_trtllm.engine.tensorrt.network import RankNetwork, build_network
from pt_trtllm.engine.tensorrt.weights import MappedWeights
from pt_trtllm.testing.network_evaluator import CollectiveLog, World


class RanksDiffer(Exception):
    """Ranks ended a step with other logits than rank 0."""


class TensorrtWorld:
    """One network per rank of a converted checkpoint."""

    def __init__(self, checkpoint_dir: Path, limits: BuildLimits, *, declared_types: bool = False) -> None:
        checkpoint, manifest = open_checkpoint(checkpoint_dir)
        self.limits, self._world_size = limits, checkpoint.world_size
        config = self.config = EngineConfig(backend="tensorrt", checkpoint=checkpoint, limits=limits)
        library = load_library("tensorrt_rtx")
        self._logger = library.module.Logger(library.module.Logger.ERROR)
        with CollectiveLog(library.module) as log:
            self.networks: list[RankNetwork] = [
                build_network(
                    library.module.Builder(self._logger),
                    library,
                    config,
                    MappedWeights(checkpoint_dir, checkpoint, manifest, rank),
                    rank,
                    context_logits=True,
                )
                for rank in range(self._world_size)
            ]
        self.world = World([built.network for built in self.networks], log, declared_types=declared_types)

    def logits(self, sequences: Sequence[Sequence[int]], num_decoded: int, chunk: int = 1 << 30) -> list[torch.Tensor]:
        """float32 [tokens, vocabulary] of every sequence; the last `num_decoded` tokens go in one by one."""
        # One row more than there are sequences: a slot that is free, and idles in every decode step.
        self.world.new_caches(len(sequences) + 1, cache_capacity(self.limits))
        logits: list[list[torch.Tensor]] = [[] for _ in sequences]
        for row, tokens in enumerate(sequences):
            prompt = len(tokens) - num_decoded
            for first in range(0, prompt, chunk):
                last = min(first + chunk, prompt)
                step = _step([list(tokens[first:last])], [first], list(range(last - first)))
                logits[row].append(self._execute(step, slice(row, row + 1)))
        for decoded in range(num_decoded):
            at = [len(tokens) - num_decoded + decoded for tokens in sequences]
            ids: list[list[int]] = [[tokens[position]] for tokens, position in zip(sequences, at, strict=True)]
            step = _step([*ids, [0]], [*at, self.limits.max_seq_len], list(range(len(sequences) + 1)))
            for row, values in enumerate(self._execute(step)[:-1]):
                logits[row].append(values[None])
        return [torch.cat(parts) for parts in logits]

    def _execute(self, step: dict[str, torch.Tensor], rows: slice = slice(None)) -> torch.Tensor:
        outputs = self.world.step([step] * self._world_size, rows)
        for rank, values in enumerate(outputs):
            if not torch.equal(values["logits"], outputs[0]["logits"]):
                raise RanksDiffer(f"ranks 0 and {rank}")
        return outputs[0]["logits"]


def _step(tokens: list[list[int]], first: list[int], logit_rows: list[int]) -> dict[str, torch.Tensor]:
    """The inputs of one execution: rows of new tokens, and where each row's cache continues."""
    int32: Callable[[Any], torch.Tensor] = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    new = len(tokens[0])
    return {
        "input_ids": int32([list(row) for row in tokens]),
        "position_ids": int32([list(range(start, start + new)) for start in first]),
        "cache_write_indices": int32(first),
        "key_value_lengths": int32([start + new for start in first]),
        "logit_rows": int32(logit_rows),
    }
