"""All ranks of a world evaluated in lock step, with the KV caches they would keep in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pt_trtllm.testing.network_evaluator.collectives import CollectiveLog, compute_collective
from pt_trtllm.testing.network_evaluator.rank_network import Meeting, RankNetwork, Walk

Values = dict[str, torch.Tensor]
UNWRITTEN = 1000.0
"""What fresh caches hold: reading a row that was never written shows in every result."""


class World:
    """One network per rank; `step` is one execution of all of them.

    With `declared_types`, every result is rounded to the type its tensor declares; without, everything is computed in
    float32, whatever the types of the network.
    """

    def __init__(
        self, networks: Sequence[Any], log: CollectiveLog | None = None, *, declared_types: bool = False
    ) -> None:
        self._ranks = [RankNetwork(network, log, declared_types) for network in networks]
        self._caches: list[Values] = [{} for _ in networks]
        self.num_collectives = 0
        """Meetings of the last step, each group's counted once."""

    def new_caches(self, batch_size: int, max_length: int) -> None:
        """Forgets all sequences. The sizes take the place of a cache's dynamic axes."""
        for rank, caches in zip(self._ranks, self._caches, strict=True):
            for name in rank.caches:
                batch, heads, length, head_dim = rank.inputs[name].shape
                shape = (batch_size if batch < 0 else batch, heads, max_length if length < 0 else length, head_dim)
                caches[name] = torch.full(shape, UNWRITTEN)

    def step(self, feeds: Sequence[Mapping[str, torch.Tensor]], rows: slice = slice(None)) -> list[Values]:
        """Every rank's outputs, without the caches, which are kept for the next step.

        `rows` are the sequences whose part of the caches is bound, as a runtime does to compute one of a batch.
        """
        bound = [{name: cache[rows] for name, cache in caches.items()} for caches in self._caches]
        outputs = self._run(
            [rank.walk({**feed, **caches}) for rank, feed, caches in zip(self._ranks, feeds, bound, strict=True)]
        )
        for rank, caches, values in zip(self._ranks, self._caches, outputs, strict=True):
            for cache, updated in rank.caches.items():
                caches[cache][rows] = values.pop(updated)
        return outputs

    def _run(self, walks: Sequence[Walk]) -> list[Values]:
        """Ranks go on until each waits for others or has ended; then every group that is complete meets."""
        self.num_collectives = 0
        outputs: dict[int, Values] = {}
        waiting: dict[int, Meeting] = {}
        to_send: dict[int, torch.Tensor | None] = dict.fromkeys(range(len(walks)))
        while len(outputs) < len(walks):
            for rank, value in to_send.items():
                try:
                    # A generator starts by being sent nothing.
                    waiting[rank] = walks[rank].send(value)  # type: ignore[arg-type]
                except StopIteration as ended:
                    outputs[rank] = ended.value
            to_send = self._meet(waiting, len(walks))
            for rank in to_send:
                del waiting[rank]
        return [outputs[rank] for rank in range(len(walks))]

    def _meet(self, waiting: Mapping[int, Meeting], world_size: int) -> dict[int, torch.Tensor | None]:
        results: dict[int, torch.Tensor | None] = {}
        for rank, (call, num_ranks, _) in waiting.items():
            group = call.group or tuple(range(world_size))
            assert rank in group, f"rank {rank} calls a collective of {list(group)}, which it is no member of"
            if rank in results or any(peer not in waiting or waiting[peer][0] != call for peer in group):
                continue
            if call.op in ("ALL_GATHER", "REDUCE_SCATTER"):
                assert num_ranks == len(group), f"num_ranks is {num_ranks}, the group is {list(group)}"
            results.update(zip(group, compute_collective(call, [waiting[peer][2] for peer in group]), strict=True))
            self.num_collectives += 1
        assert results or not waiting, "ranks wait for each other: " + "; ".join(
            f"rank {rank} in {call}" for rank, (call, _, _) in waiting.items()
        )
        return results
