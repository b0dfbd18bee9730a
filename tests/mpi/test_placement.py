"""Several hosts, pretended by placement alone: every order of ranks over hosts gives the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pt_trtllm.runtime.launch import launch_command

pytestmark = pytest.mark.mpi

HOSTS = ([0, 0, 0, 0], [0, 0, 2, 2], [0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 2, 3])
PLACEMENTS = [(hosts, num_tracks) for hosts in HOSTS for num_tracks in (4, 2)]
"""The host of each rank, and the tracks that they hold."""
PROGRAM = """
import json, pathlib, sys
import torch
from pt_trtllm.comm.mpi import MpiCommunicator
from pt_trtllm.mapping import Mapping

def check(hosts, num_tracks):
    MpiCommunicator._hosts = lambda self: hosts
    comm = MpiCommunicator(Mapping(world_size=4, num_tracks=num_tracks), timeout_s=120, load_timeout_s=120)
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
    if comm.rank == 0:
        pathlib.Path(sys.argv[2], f"{hosts}-{num_tracks}").touch()

torch.set_num_threads(1)
for placement in json.loads(sys.argv[1]):
    check(*placement)
"""


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], str]:
    """The placements that gave right answers, one after the other in one world, and what its ranks said."""
    folder = tmp_path_factory.mktemp("placements")
    command = [*launch_command(4), sys.executable, "-c", PROGRAM, json.dumps(PLACEMENTS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    return {path.name for path in Path(folder).iterdir()}, done.stderr


@pytest.mark.parametrize(("hosts", "num_tracks"), PLACEMENTS, ids=str)
def test_ranks_may_be_placed_in_any_order_over_hosts(
    passed: tuple[set[str], str], hosts: list[int], num_tracks: int
) -> None:
    assert f"{hosts}-{num_tracks}" in passed[0], passed[1][-3000:]
