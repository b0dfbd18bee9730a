"""Values of the shared-memory collectives, over real processes, bit for bit."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pt_trtllm.comm.track_fusion import ShmGroup, library_path
from pt_trtllm.errors import CommunicationError

sys.path.insert(0, str(Path(__file__).parent))  # the ranks import their tasks by name
import track_fusion_procs as procs

pytestmark = pytest.mark.unit

SMALL_SHAPES = [(1, 64), (3, 33), (0, 64), (2, 1), (1, 257)]
# Above the two-phase limit (64 KiB) for every type, with rows cut by pieces and a last piece of odd size.
LARGE_SHAPES = [(37, 1031), (2, 40001)]


@pytest.fixture(scope="module")
def pool() -> Iterator[procs.RankPool]:
    try:
        library_path()
    except CommunicationError as error:
        pytest.skip(str(error))
    pool = procs.RankPool()
    yield pool
    pool.close()


def skip_unless_runnable(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_TRACK_FUSION_ISA", isa)
    try:
        ShmGroup.create(size=1).close()
    except CommunicationError as error:
        pytest.skip(f"{isa}: {error}")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_gets_the_reference_bits_of_small_messages(pool: procs.RankPool, size: int) -> None:
    digests = pool.run(size, procs.check_fuse_cases, SMALL_SHAPES)
    assert len(set(digests)) == 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_reference_bits_of_messages_above_the_capacity(pool: procs.RankPool, size: int) -> None:
    digests = pool.run(size, procs.check_fuse_cases, LARGE_SHAPES, capacity_bytes=4096 if size == 3 else 64 * 1024)
    assert len(set(digests)) == 1


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instruction_sets_give_the_bits_of_the_baseline(
    pool: procs.RankPool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_runnable(isa, monkeypatch)
    shapes = [(3, 333), (9, 2500)]
    assert pool.run(3, procs.check_fuse_cases, shapes, isa=isa) == pool.run(
        3, procs.check_fuse_cases, shapes, isa="baseline"
    )


def test_an_unknown_instruction_set_is_refused(pool: procs.RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_TRACK_FUSION_ISA", "avx1024")
    with pytest.raises(CommunicationError, match="PT_TRACK_FUSION_ISA is 'avx1024', this build has: baseline"):
        ShmGroup.create(size=1)


def test_infinity_and_nan_pass_through(pool: procs.RankPool) -> None:
    results = pool.run(2, procs.pass_specials_through)
    assert results[0] == results[1]
    quiet_nan = {torch.float32: "0000c07f", torch.bfloat16: "c07f", torch.float16: "007e"}
    for dtype, text in zip(procs.DTYPES, results[0], strict=True):
        assert text.startswith("[[inf, -inf, nan, nan, 0.0, -0.0]]")
        assert text.count(quiet_nan[dtype]) == 2


@pytest.mark.parametrize(("size", "capacity_bytes"), [(2, 4096), (3, 16384), (4, 65536)])
def test_mixed_operations_in_random_order_agree(pool: procs.RankPool, size: int, capacity_bytes: int) -> None:
    digests = pool.run(size, procs.mix_operations, 100 + size, 300, capacity_bytes=capacity_bytes)
    assert len(set(digests)) == 1


def test_bytes_of_any_length_are_broadcast_and_gathered(pool: procs.RankPool) -> None:
    pool.run(3, procs.move_bytes, capacity_bytes=4096)


def test_the_torch_operator_is_compiled_once_for_all_sizes_and_equals_the_method(pool: procs.RankPool) -> None:
    (compilations, digest), other = pool.run(2, procs.call_torch_operator)
    assert (compilations, digest) == other == (1, digest)


def test_a_process_group_of_torch_exchanges_bytes_in_rank_order(pool: procs.RankPool, tmp_path: Path) -> None:
    expected = [[b"\0" * length, b"\1" * length] for length in (1, 64)]
    assert pool.run(2, procs.exchange_over_process_group, str(tmp_path / "meeting")) == [expected] * 2


@pytest.fixture
def lone_group(pool: procs.RankPool) -> Iterator[ShmGroup]:
    with ShmGroup.create(size=1, capacity_bytes=4096) as group:
        yield group


def test_unsuitable_tensors_are_refused_with_what_was_found(lone_group: ShmGroup) -> None:
    x = torch.ones(2, 4)
    with pytest.raises(CommunicationError, match=r"fuse: x is float64 \[2, 4\] contiguous on cpu, expected float32"):
        lone_group.fuse(x.double())
    with pytest.raises(CommunicationError, match=r"fuse: x is float32 \[4, 2\] strided on cpu"):
        lone_group.fuse(x.t())
    with pytest.raises(CommunicationError, match=r"on meta, expected .* contiguous on cpu"):
        lone_group.fuse(x.to("meta"))
    with pytest.raises(CommunicationError, match=r"residual is float32 \[4\] .* expected float32 \[2, 4\]"):
        lone_group.fuse(x, residual=torch.ones(4))
    with pytest.raises(CommunicationError, match=r"gamma is float32 \[2\] .* expected float32 \['num_gammas', 4\]"):
        lone_group.fuse(x, gamma=torch.ones(2))
    with pytest.raises(CommunicationError, match="op is 'max', expected 'mean' or 'sum'"):
        lone_group.fuse(x, op="max")
    with pytest.raises(CommunicationError, match=r"gather: x is float32 \[4\] .* expected any type, two dimensions"):
        lone_group.gather(torch.ones(4))
    with pytest.raises(CommunicationError, match="root is 1, expected 0 to 0"):
        lone_group.barrier() or lone_group.gather(x, root=1)
    lone_group.barrier()  # a refused argument leaves the group usable


def test_a_closed_group_says_so(lone_group: ShmGroup) -> None:
    lone_group.close()
    lone_group.close()
    with pytest.raises(CommunicationError, match="the group is closed"):
        lone_group.barrier()
