"""Track fusion as a torch operator: what a compiler may expect of it, and whom a name means."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.comm.cuda_fusion import CudaFusion
from pt_trtllm.comm.track_fusion import ShmGroup
from pt_trtllm.errors import CommunicationError
from pt_trtllm.testing.threads import ThreadExchange

pytestmark = pytest.mark.unit
fuse = torch.ops.pt_trtllm.track_fusion


@pytest.fixture
def group() -> Iterator[ShmGroup]:
    with ShmGroup.create(size=1, capacity_bytes=4096) as group:
        group.register("tracks")
        yield group


def test_graphs_that_were_compiled_earlier_still_fit() -> None:
    schema = str(fuse.default._schema)
    assert schema == (
        'pt_trtllm::track_fusion(Tensor x, str group, str op="mean", Tensor? residual=None, Tensor? gamma=None, '
        "float eps=1.0000000000000001e-05) -> (Tensor, Tensor)"
    )


@pytest.mark.parametrize(
    "x", [torch.ones(3, 16), torch.ones(0, 16), torch.ones(16, 3).t()], ids=["rows", "no rows", "columns"]
)
@pytest.mark.parametrize("gamma", [None, torch.ones(16), torch.ones(2, 16)], ids=["no norm", "one norm", "two norms"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_it_keeps_the_rules_that_torch_has_for_operators(
    group: ShmGroup, x: torch.Tensor, gamma: torch.Tensor | None, has_residual: bool
) -> None:
    torch.library.opcheck(fuse.default, (x, "tracks", "mean", torch.ones_like(x) if has_residual else None, gamma))


def test_an_unknown_name_is_told_with_the_known_ones(group: ShmGroup) -> None:
    with pytest.raises(CommunicationError, match=r"there is no group 'nobody' in this process, only these: .*tracks"):
        fuse(torch.ones(1, 4), "nobody")
    with pytest.raises(CommunicationError, match="the name of a group is empty"):
        group.register("")


def test_a_name_belongs_to_one_group_as_long_as_it_lives(group: ShmGroup) -> None:
    group.register("tracks")  # again, for itself
    other = ShmGroup.create(size=1)
    with pytest.raises(CommunicationError, match="there is a group 'tracks' already in this process; close it first"):
        other.register("tracks")
    group.close()
    other.register("tracks")
    assert fuse(torch.ones(1, 4), "tracks")[0].tolist() == [[1.0] * 4]
    del other
    gc.collect()
    with pytest.raises(CommunicationError, match="there is no group 'tracks'"):
        fuse(torch.ones(1, 4), "tracks")


def test_a_channel_loses_its_names_when_it_is_closed() -> None:
    def channel() -> CudaFusion:
        return CudaFusion(rank=0, size=1, exchange=ThreadExchange(1).for_rank(0), provider="host_threads")

    with channel() as first, channel() as second:
        first.register("gpu")
        with pytest.raises(CommunicationError, match="there is a group 'gpu' already"):
            second.register("gpu")
        first.close()
        second.register("gpu")
        assert fuse(torch.ones(1, 4), "gpu", "sum")[0].tolist() == [[1.0] * 4]


NEXT_PROCESS = """
import json, sys
import torch
from torch._dynamo.utils import counters
from pt_trtllm.comm.track_fusion import ShmGroup

def block(x, gammas):
    return torch.ops.pt_trtllm.track_fusion(x, "tracks", "mean", x, gammas)

decoys = [ShmGroup.create(size=1) for _ in range(int(sys.argv[1]))]
for number, decoy in enumerate(decoys):
    decoy.register(f"decoy {number}")
compiled = torch.compile(block, fullgraph=True)
x = torch.arange(32.0).reshape(2, 16)
torch._dynamo.mark_dynamic(x, 0)
try:
    compiled(x, torch.ones(2, 16))
    missing = ""
except Exception as error:
    missing = str(error)
group = ShmGroup.create(size=1)
group.register("tracks")
h, normed = compiled(x, torch.ones(2, 16))
print(json.dumps({"missing": missing, "h": h.tolist(), "shape": list(normed.shape), **counters["inductor"]}))
"""


def test_a_graph_that_another_process_compiled_finds_its_group(tmp_path: Path) -> None:
    def run(decoys: int) -> dict[str, Any]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
        command = [sys.executable, "-c", NEXT_PROCESS, str(decoys)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    first, second = run(decoys=2), run(decoys=0)
    assert first["fxgraph_cache_miss"] == 1
    assert second["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in second
    for found in (first, second):
        assert "there is no group 'tracks' in this process" in found["missing"]
        assert found["shape"] == [2, 2, 16]
        assert found["h"] == (2 * torch.arange(32.0)).reshape(2, 16).tolist()
    assert "only these: decoy 0, decoy 1" in first["missing"]
    assert "only these: none" in second["missing"]
