"""Several hosts, pretended by placement alone: every order of ranks over hosts gives the same answers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pt_trtllm.runtime.launch import launch_command

pytestmark = pytest.mark.mpi

PROGRAM = """
import json, sys
import torch
from pt_trtllm.comm.mpi import MpiCommunicator
from pt_trtllm.mapping import Mapping

hosts, num_tracks = json.loads(sys.argv[1]), int(sys.argv[2])
MpiCommunicator._hosts = lambda self: hosts
comm = MpiCommunicator(Mapping(world_size=4, num_tracks=num_tracks), timeout_s=30, load_timeout_s=30)
mapping = Mapping(world_size=4, num_tracks=num_tracks, rank=comm.rank)
assert comm.num_hosts == len(set(hosts))

mine = torch.full((3, 5), float(comm.rank + 1))
fused = comm.track_fusion(mine, "mean")
assert torch.equal(fused, torch.full((3, 5), sum(r + 1 for r in mapping.fusion_group) / len(mapping.fusion_group)))
reduced = comm.all_reduce(mine[None])
assert torch.equal(reduced, torch.full((1, 3, 5), float(sum(r + 1 for r in mapping.tp_group)))), reduced

shard = torch.arange(2.0)[:, None] * 100 + comm.rank * 10 + torch.arange(3.0)
logits = comm.gather_logits(shard)
if comm.rank == 0:
    expected = torch.cat([torch.arange(2.0)[:, None] * 100 + r * 10 + torch.arange(3.0) for r in range(4)], dim=1)
    assert torch.equal(logits, expected), logits
else:
    assert logits is None
for size in (0, 10, 100_000):
    assert comm.broadcast(b"x" * size if comm.rank == 0 else None) == b"x" * size
comm.barrier()
comm.close()
"""


@pytest.mark.parametrize("hosts", [[0, 0, 0, 0], [0, 0, 2, 2], [0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("num_tracks", [4, 2])
def test_ranks_may_be_placed_in_any_order_over_hosts(hosts: list[int], num_tracks: int) -> None:
    command = [*launch_command(4), sys.executable, "-c", PROGRAM, str(hosts), str(num_tracks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
