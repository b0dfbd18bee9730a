"""Ranks of an MPI world: shared memory inside a host, MPI between the leaders of hosts.

MPI starts the ranks and introduces them; what is waited for in every step runs through the track-fusion library,
which is faster, bounded in time, and says who is missing.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import Any

import torch

from pt_trtllm.comm.base import CommStats
from pt_trtllm.comm.coding import NO_CODING, Coding
from pt_trtllm.comm.hosts import sum_over_hosts
from pt_trtllm.comm.track_fusion import ShmGroup
from pt_trtllm.errors import CommunicationError
from pt_trtllm.mapping import Mapping

INLINE_BYTES = 8192
"""Broadcasts up to this length need one message; a decode step fits."""
LENGTH = struct.Struct("<q")


class MpiCommunicator:
    """Implements `Communicator` for one rank of MPI.COMM_WORLD."""

    def __init__(
        self, mapping: Mapping, *, timeout_s: float, load_timeout_s: float, fusion_coding: Coding = NO_CODING
    ) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        if self._world.size != mapping.world_size:
            raise CommunicationError(
                f"MPI started {self._world.size} ranks, the engine was built for {mapping.world_size}; "
                f"launch with that many"
            )
        self.rank, self.world_size = self._world.rank, mapping.world_size
        mapping = mapping.for_rank(self.rank)
        self.stats = CommStats()
        self._load_timeout_s = load_timeout_s
        self._fusion_coding = fusion_coding
        hosts = self._hosts()
        self.num_hosts = len(set(hosts))
        everyone = tuple(range(self.world_size))
        links = {everyone: RankGroup(self._world, everyone, hosts, timeout_s)}
        # Every rank walks through the kinds of groups in this order; members of one group meet in its set-up.
        for members in (mapping.tp_group, mapping.fusion_group):
            if len(members) > 1 and members not in links:
                links[members] = RankGroup(self._world, members, hosts, timeout_s)
        self._everyone, self._links = links[everyone], list(links.values())
        self._tp, self._fusion = links.get(mapping.tp_group), links.get(mapping.fusion_group)

    def _hosts(self) -> list[int]:
        """For every rank, the lowest rank on its host."""
        from mpi4py import MPI

        local = self._world.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        first = local.bcast(self.rank, root=0)
        local.Free()
        hosts: list[int] = self._world.allgather(first)
        return hosts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._tp is None:
            return x
        with self.stats.measure("tensor_parallel"):
            return self._tp.reduce(x, "sum", "all_reduce")

    def track_fusion(self, hidden: torch.Tensor, op: str, base: torch.Tensor | None = None) -> torch.Tensor:
        if self._fusion is None:
            return hidden
        with self.stats.measure("track_fusion"):
            return self._fusion.reduce(hidden, op, "track_fusion", self._fusion_coding, base)

    def gather_logits(self, shard: torch.Tensor) -> torch.Tensor | None:
        with self.stats.measure("logits"):
            return self._everyone.gather(shard)

    def broadcast(self, payload: bytes | None) -> bytes:
        return self._everyone.broadcast(payload)

    def collect(self, payload: bytes) -> list[bytes]:
        import numpy as np

        sizes = self._world.gather(len(payload), root=0)
        mine = np.frombuffer(payload, dtype=np.uint8)
        if sizes is None:
            self._world.Gatherv(mine, None, root=0)
            return []
        whole = np.empty(sum(sizes), dtype=np.uint8)
        self._world.Gatherv(mine, (whole, sizes), root=0)
        ends = np.cumsum(sizes)
        return [whole[end - size : end].tobytes() for size, end in zip(sizes, ends, strict=True)]

    def barrier(self) -> None:
        self._everyone.barrier(self._load_timeout_s)

    def abort(self, reason: str) -> None:
        for link in self._links:
            link.abort(reason)

    def close(self) -> None:
        for link in self._links:
            link.close()


class RankGroup:
    """An ordered group of global ranks that this rank belongs to, over one or several hosts."""

    def __init__(self, world: Any, members: Sequence[int], hosts: list[int], timeout_s: float) -> None:
        self.members, self.size = tuple(members), len(members)
        self._rank, self._timeout_s = world.rank, timeout_s
        self._local = [rank for rank in members if hosts[rank] == hosts[world.rank]]
        by_host: dict[int, list[int]] = {}
        for rank in members:
            by_host.setdefault(hosts[rank], []).append(rank)
        self._host_members = sorted(by_host.values())
        """Members by host, in the order of their first ranks: that of the leaders."""
        self._leader_ranks = [ranks[0] for ranks in self._host_members]
        self._is_leader = world.rank == self._local[0]
        self._shm = self._open_shared(world, self._local)
        # Split is collective over the world: every rank takes part, whatever its group.
        from mpi4py import MPI

        self._leaders = world.Split(members[0] if self._is_leader else MPI.UNDEFINED, key=world.rank)
        self._one_host = len(self._leader_ranks) == 1

    def _open_shared(self, world: Any, local: list[int]) -> ShmGroup:
        """Shared memory with the members on this host. Collective over the world, whatever the groups."""
        timeout_s = self._timeout_s
        shm = ShmGroup.create(size=len(local), timeout_s=timeout_s) if self._is_leader else None
        names = world.allgather(shm.name if shm else None)
        if shm is None:
            rank = local.index(world.rank)
            shm = ShmGroup.attach(names[local[0]], rank=rank, size=len(local), timeout_s=timeout_s)
        world.Barrier()  # all have attached: the name can go, so that nothing is left even after SIGKILL
        if self._is_leader:
            shm.unlink()
        return shm

    def reduce(
        self,
        x: torch.Tensor,
        op: str,
        operation: str,
        coding: Coding = NO_CODING,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean or sum of x over the group. `base`, the same on all ranks, is what a delta is taken against."""
        if coding.delta and base is None:
            raise CommunicationError(f"{operation}: delta coding needs a base, which this call does not have")
        rows, known = x.reshape(-1, x.shape[-1]), base.reshape(-1, x.shape[-1]) if base is not None else None
        try:
            return self._reduce(rows, op, operation, coding, known if coding.delta else None).view(x.shape)
        except CommunicationError as error:
            if self._local == list(range(len(self._local))):
                raise
            raise CommunicationError(f"{error} (ranks of this group are ranks {self._local} of the world)") from None

    def _reduce(
        self, rows: torch.Tensor, op: str, operation: str, coding: Coding, base: torch.Tensor | None
    ) -> torch.Tensor:
        if self._one_host:
            return self._shm.fuse(rows, op=op, residual=base, coding=coding)[0]
        # float32 sums per host, added in the order of hosts: the same on every rank. Only what leaves a host is coded.
        own = rows.float() if base is None else rows.float() - base.float()
        total = self._shm.fuse(own, op="sum")[0]
        result = torch.empty_like(rows)
        if self._is_leader:
            total = sum_over_hosts(
                self._leaders, total, coding, lambda request: self._wait(request, operation, self._timeout_s)
            )
            total = total * (1.0 / self.size) if op == "mean" else total
            result = (total if base is None else base.float() + total).to(rows.dtype)
        self._shm.broadcast(result, root=0)
        return result

    def gather(self, shard: torch.Tensor) -> torch.Tensor | None:
        """[rows, columns] of all members side by side, in the order of ranks, on the first; None on the others."""
        local = self._shm.gather(shard, root=0)
        if self._one_host or not self._is_leader:
            return local
        assert local is not None
        if self._leaders.rank != 0:
            self._wait(self._leaders.Isend(_mpi_buffer(local.contiguous()), dest=0), "gather", self._timeout_s)
            return None
        rows, width = shard.shape
        whole = torch.empty((rows, self.size, width), dtype=shard.dtype)
        for host, members in enumerate(self._host_members):
            part = local if host == 0 else torch.empty((rows, len(members) * width), dtype=shard.dtype)
            if host:
                self._wait(self._leaders.Irecv(_mpi_buffer(part), source=host), "gather", self._timeout_s)
            # Ranks need not be placed host by host.
            whole[:, [self.members.index(rank) for rank in members]] = part.view(rows, len(members), width)
        return whole.flatten(1)

    def broadcast(self, payload: bytes | None) -> bytes:
        """Any length, from the first member. The first message carries the length and short payloads."""
        head, room = bytearray(INLINE_BYTES), INLINE_BYTES - LENGTH.size
        if payload is not None:
            LENGTH.pack_into(head, 0, len(payload))
            head[LENGTH.size : LENGTH.size + min(len(payload), room)] = payload[:room]
        self._broadcast_buffer(head, forever=True)
        (length,) = LENGTH.unpack_from(head)
        inline = bytes(head[LENGTH.size : LENGTH.size + min(length, room)])
        if length <= room:
            return inline
        rest = bytearray(length - room) if payload is None else bytearray(payload[room:])
        self._broadcast_buffer(rest, forever=False)
        return inline + bytes(rest)

    def _broadcast_buffer(self, buffer: bytearray, *, forever: bool) -> None:
        if not self._one_host and self._is_leader:
            self._wait(self._leaders.Ibcast(buffer, root=0), "broadcast", 0.0 if forever else self._timeout_s)
        self._shm.broadcast(buffer, root=0, timeout_s=0.0 if forever else None)

    def barrier(self, timeout_s: float) -> None:
        self._shm.barrier(timeout_s)
        if not self._one_host:
            if self._is_leader:
                self._wait(self._leaders.Ibarrier(), "barrier", timeout_s)
            self._shm.barrier(timeout_s)

    def _wait(self, request: Any, operation: str, timeout_s: float) -> None:
        """Polls an MPI request: spins briefly, then sleeps, and gives up with a message. 0 waits for ever."""
        start, polls = time.monotonic(), 0
        while not request.Test():
            polls += 1
            if polls > 2000:
                time.sleep(2e-4)
            if polls % 256 == 0 and 0 < timeout_s < time.monotonic() - start:
                raise CommunicationError(
                    f"{operation}: rank {self._rank} waited {timeout_s:.0f} s for the leaders of other hosts "
                    f"(ranks {[rank for rank in self._leader_ranks if rank != self._rank]})"
                )

    def abort(self, reason: str) -> None:
        self._shm.abort(reason)

    def close(self) -> None:
        self._shm.close()


def _mpi_buffer(values: torch.Tensor) -> Any:
    """What mpi4py takes: the memory of a contiguous float32 tensor."""
    return values.numpy()
