"""GPU track fusion through its C ABI and torch operator; here with threads as ranks and host memory for devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from pt_trtllm.comm.coding import CODECS, Coding
from pt_trtllm.comm.cuda_fusion import CudaFusion
from pt_trtllm.comm.exchange import over_shared_memory
from pt_trtllm.comm.track_fusion import ShmGroup
from pt_trtllm.errors import CommunicationError
from pt_trtllm.testing.threads import ThreadExchange

pytestmark = pytest.mark.unit
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run_ranks(size: int, body: Callable[[CudaFusion], Any], **options: Any) -> list[Any]:
    exchange = ThreadExchange(size)

    def rank_main(rank: int) -> Any:
        settings: dict[str, Any] = {"provider": "host_threads", "timeout_s": 120.0, **options}
        with CudaFusion(rank=rank, size=size, exchange=exchange.for_rank(rank), **settings) as channel:
            return body(channel)

    with ThreadPoolExecutor(size) as pool:
        return [future.result(timeout=240) for future in [pool.submit(rank_main, rank) for rank in range(size)]]


def inputs(rank: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank + 1)).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """To compare NaN and the sign of zero as well."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def reference(size: int, dtype: torch.dtype, op: str, shape: tuple[int, ...]) -> torch.Tensor:
    total = inputs(0, dtype, *shape).float()
    for rank in range(1, size):
        total = total + inputs(rank, dtype, *shape).float()
    return (total * (1.0 / size) if op == "mean" else total).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("algorithm", ["one_shot", "pull", "two_shot"])
def test_every_algorithm_gives_the_bits_of_a_sum_in_rank_order(size: int, algorithm: str) -> None:
    def body(channel: CudaFusion) -> list[torch.Tensor]:
        return [
            channel.fuse(inputs(channel.rank, dtype, *shape), op=op, algorithm=algorithm)[0]
            for dtype in DTYPES
            for shape in ((1, 8), (5, 40), (3, 33), (17, 512))
            for op in ("mean", "sum")
        ]

    everyone = run_ranks(size, body, staging_bytes=16384)
    expected = [
        reference(size, dtype, op, shape)
        for dtype in DTYPES
        for shape in ((1, 8), (5, 40), (3, 33), (17, 512))
        for op in ("mean", "sum")
    ]
    for results in everyone:
        for result, want in zip(results, expected, strict=True):
            torch.testing.assert_close(result, want, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvls_gives_all_ranks_the_same_bits_of_a_sum_that_the_switch_rounds(size: int, dtype: torch.dtype) -> None:
    """Here the switch is emulated: in rank order, rounded to nearest. So only the residual sees a second rounding."""
    shapes = ((1, 8), (5, 40), (3, 33), (17, 512))
    gamma = torch.linspace(0.5, 1.5, 512)

    def body(channel: CudaFusion) -> list[torch.Tensor]:
        results = [
            channel.fuse(inputs(channel.rank, dtype, *shape), op=op, algorithm="nvls")[0]
            for shape in shapes
            for op in ("mean", "sum")
        ]
        x, residual = inputs(channel.rank, dtype, 17, 512), inputs(99 + channel.rank, dtype, 17, 512)
        h, normed = channel.fuse(x, residual=residual, gamma=gamma, algorithm="nvls")
        mean = reference(size, dtype, "mean", (17, 512))
        torch.testing.assert_close(h, (mean.float() + residual.float()).to(dtype), rtol=0, atol=0)
        assert normed is not None
        want = torch.nn.functional.rms_norm(h.float(), (512,), gamma, 1e-5).to(dtype)
        torch.testing.assert_close(normed, want, rtol=4 * torch.finfo(dtype).eps, atol=0)
        return results

    everyone = run_ranks(size, body, staging_bytes=16384, use_nvls=True)
    expected = [reference(size, dtype, op, shape) for shape in shapes for op in ("mean", "sum")]
    for results in everyone:
        for result, want in zip(results, expected, strict=True):
            torch.testing.assert_close(result, want, rtol=0, atol=0)


def test_nvls_has_to_be_prepared_and_has_no_coded_form() -> None:
    def refused(use_nvls: bool, message: str, **arguments: Any) -> None:
        def body(channel: CudaFusion) -> None:
            with pytest.raises(CommunicationError, match=message):
                channel.fuse(torch.ones(2, 8), algorithm="nvls", **arguments)
            assert torch.equal(channel.fuse(torch.ones(2, 8))[0], torch.ones(2, 8))

        run_ranks(2, body, use_nvls=use_nvls)

    refused(False, "opened without use_nvls")
    refused(True, "no coded form", coding=Coding(codec="int8"))
    with pytest.raises(CommunicationError, match="use_nvls is set, and size is 1, expected at least 2"):
        run_ranks(1, lambda channel: None, use_nvls=True)


def test_the_processors_own_collective_gives_the_same_bits() -> None:
    """The CPU library and the protocols of the GPU: one contract."""
    groups = [ShmGroup.create(size=2)]
    groups.append(ShmGroup.attach(groups[0].name, rank=1, size=2))
    gamma = torch.linspace(0.5, 1.5, 96)

    def body(channel: CudaFusion) -> None:
        for dtype in DTYPES:
            x = inputs(channel.rank, dtype, 7, 96)
            residual = inputs(9, dtype, 7, 96)
            h, normed = channel.fuse(x, residual=residual, gamma=gamma)
            h_cpu, normed_cpu = groups[channel.rank].fuse(x, residual=residual, gamma=gamma)
            assert torch.equal(h, h_cpu)
            assert normed is not None
            assert normed_cpu is not None
            step = torch.finfo(dtype).eps
            torch.testing.assert_close(normed, normed_cpu, rtol=4 * step, atol=0)

    run_ranks(2, body)
    for group in groups:
        group.close()


@pytest.fixture
def groups() -> Iterator[list[ShmGroup]]:
    """Three ranks of the CPU library."""
    first = ShmGroup.create(size=3)
    members = [first, *(ShmGroup.attach(first.name, rank=rank, size=3) for rank in (1, 2))]
    yield members
    for group in members:
        group.close()


@pytest.mark.parametrize("codec", CODECS[1:])
@pytest.mark.parametrize(
    ("rounding", "algorithms"), [("one_shot", ("auto", "one_shot", "pull")), ("two_shot", ("auto", "two_shot"))]
)
def test_encoded_messages_give_the_bits_of_the_processors_own_collective(
    groups: list[ShmGroup], codec: str, rounding: str, algorithms: tuple[str, ...]
) -> None:
    """One rounding by one-shot and pull, two by two-shot, in pieces; and the CPU library."""
    shapes = ((1, 8), (5, 96), (3, 33), (9, 400), (2, 1100))

    def body(channel: CudaFusion) -> None:
        for dtype, shape, delta in itertools.product(DTYPES, shapes, (False, True)):
            x, residual = inputs(channel.rank, dtype, *shape), inputs(9, dtype, *shape)
            x[0, 3] = float("inf") if channel.rank == 1 else 0.0
            gamma = torch.linspace(0.5, 1.5, shape[1])
            coding = Coding(codec=codec, delta=delta, algorithm=rounding)
            want, want_normed = groups[channel.rank].fuse(x, residual=residual, gamma=gamma, coding=coding)
            for algorithm in algorithms:
                h, normed = channel.fuse(x, residual=residual, gamma=gamma, algorithm=algorithm, coding=coding)
                assert torch.equal(bits(h), bits(want))
                assert normed is not None
                assert want_normed is not None
                step = torch.finfo(dtype).eps
                torch.testing.assert_close(normed, want_normed, rtol=4 * step, atol=0, equal_nan=True)
            if not delta:
                h, _ = channel.fuse(x, op="sum", coding=coding)
                assert torch.equal(bits(h), bits(groups[channel.rank].fuse(x, op="sum", coding=coding)[0]))

    run_ranks(3, body, staging_bytes=4096)


def test_large_encoded_messages_are_rounded_twice_unless_told_otherwise(groups: list[ShmGroup]) -> None:
    def body(channel: CudaFusion) -> None:
        x = inputs(channel.rank, torch.bfloat16, 40, 512)
        results = {}
        for rounding in ("auto", "one_shot", "two_shot"):
            coding = Coding(codec="fp8", algorithm=rounding)
            results[rounding] = channel.fuse(x, coding=coding)[0]
            if rounding != "auto":  # the CPU's choice has limits of its own
                assert torch.equal(results[rounding], groups[channel.rank].fuse(x, coding=coding)[0])
        assert torch.equal(results["auto"], results["two_shot"])
        assert not torch.equal(results["auto"], results["one_shot"])

    run_ranks(3, body, one_shot_bytes=4096, pull_bytes=16384)


def test_the_exchange_may_run_over_the_communicators_own_group() -> None:
    groups = [ShmGroup.create(size=2)]
    groups.append(ShmGroup.attach(groups[0].name, rank=1, size=2))

    def rank_main(rank: int) -> torch.Tensor:
        exchange = over_shared_memory(groups[rank])
        with CudaFusion(rank=rank, size=2, exchange=exchange, provider="host_threads") as channel:
            return channel.fuse(torch.full((2, 8), float(rank)))[0]

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(rank_main, range(2)):
            assert torch.equal(result, torch.full((2, 8), 0.5))
    for group in groups:
        group.close()


def test_the_torch_operator_takes_a_channel_as_it_takes_a_group() -> None:
    def body(channel: CudaFusion) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((3, 16), float(channel.rank + 1))
        name = f"channel of rank {channel.rank}"  # the ranks are threads of one process
        channel.register(name)
        h, normed = torch.ops.pt_trtllm.track_fusion(x, name, "sum", None, torch.ones(2, 16), 0.0)
        return h, normed

    for h, normed in run_ranks(2, body):
        assert torch.equal(h, torch.full((3, 16), 3.0))
        assert torch.equal(normed, torch.ones(2, 3, 16))


def test_an_absent_rank_is_named_and_everybody_learns_it() -> None:
    def body(channel: CudaFusion) -> str:
        if channel.rank == 2:
            return "absent"
        result, _ = channel.fuse(torch.ones(4, 64))
        assert not result.any()
        with pytest.raises(CommunicationError) as caught:
            channel.fuse(torch.ones(4, 64))
        with pytest.raises(CommunicationError):
            channel.check_status()
        return str(caught.value)

    texts = run_ranks(3, body, timeout_s=2.0)
    assert any("waited 2.0 s for rank 2 in one-shot, call 0: its message did not arrive" in text for text in texts)
    for text in texts[:2]:
        assert "for rank 2" in text or "ended the channel" in text


def test_ranks_that_disagree_all_fail_to_open() -> None:
    exchange = ThreadExchange(2)

    def rank_main(rank: int) -> str:
        with pytest.raises(CommunicationError) as caught:
            CudaFusion(
                rank=rank,
                size=2,
                exchange=exchange.for_rank(rank),
                provider="host_threads",
                staging_bytes=65536 * (1 + rank),
            )
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(rank_main, range(2)))
    assert all("different configurations" in text for text in texts)


def test_a_failing_exchange_is_raised_as_it_was() -> None:
    def exchange(mine: bytes) -> list[bytes]:
        raise ConnectionError("the line is dead")

    with pytest.raises(ConnectionError, match="the line is dead"):
        CudaFusion(rank=0, size=2, exchange=exchange, provider="host_threads")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 8).t()}, "x is float32 .8, 2. strided on cpu"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x is int32"),
        ({"x": torch.ones(2, 8), "op": "max"}, "op is 'max'"),
        ({"x": torch.ones(2, 8), "residual": torch.ones(2, 4)}, "residual is"),
        ({"x": torch.ones(2, 8), "gamma": torch.ones(4)}, "gamma is"),
        ({"x": torch.ones(2, 8), "algorithm": "nccl", "coding": Coding(codec="int8")}, "has no coded form"),
        ({"x": torch.ones(2, 8), "coding": Coding(codec="int8", delta=True)}, "a mean and a residual"),
        ({"x": torch.ones(2, 8), "algorithm": "nvls"}, "nvls needs at least 2 ranks, this channel has 1"),
        ({"x": torch.ones(2, 8), "algorithm": "nccl"}, "not every rank has libnccl"),
        ({"x": torch.ones(2, 8), "algorithm": "two_shot", "residual": torch.ones(2, 8)}, "use pull"),
        ({"x": torch.ones(1, 1 << 20), "gamma": torch.ones(1 << 20)}, "a row takes 4194304 bytes of staging memory"),
    ],
)
def test_bad_arguments_are_refused_and_harm_nothing(arguments: dict[str, Any], message: str) -> None:
    def body(channel: CudaFusion) -> None:
        with pytest.raises(CommunicationError, match=message):
            channel.fuse(**arguments)
        assert torch.equal(channel.fuse(torch.ones(2, 8))[0], torch.ones(2, 8))

    run_ranks(1, body, staging_bytes=65536)
