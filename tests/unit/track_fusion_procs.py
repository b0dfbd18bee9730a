"""Processes as ranks for the track-fusion tests, the tasks they run, and the reference arithmetic."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
import torch

from pt_trtllm.comm.exchange import over_process_group
from pt_trtllm.comm.track_fusion import ShmGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEADLINE_S = 240.0
"""Only ends a hang."""


# --- ranks ------------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    process: SpawnProcess
    pipe: Connection


@dataclass
class Job:
    """One task that is running on every rank of a group."""

    workers: list[Worker]

    def pid(self, rank: int) -> int:
        pid = self.workers[rank].process.pid
        assert pid is not None
        return pid

    def kill(self, rank: int) -> None:
        """SIGKILL, and back when the process has ended."""
        self.workers[rank].process.kill()
        self.workers[rank].process.join(DEADLINE_S)

    def outcome(self, rank: int, deadline_s: float = DEADLINE_S) -> tuple[bool, Any]:
        """(True, returned value) or (False, error text)."""
        pipe = self.workers[rank].pipe
        if not pipe.poll(deadline_s):
            raise AssertionError(f"rank {rank} did not answer within {deadline_s} s")
        answer: tuple[bool, Any] = pipe.recv()
        return answer

    def error(self, rank: int) -> str:
        succeeded, text = self.outcome(rank)
        assert not succeeded, f"rank {rank} returned {text!r}, expected an error"
        return str(text)

    def values(self) -> list[Any]:
        outcomes = [self.outcome(rank) for rank in range(len(self.workers))]
        failed = [f"rank {rank}: {value}" for rank, (succeeded, value) in enumerate(outcomes) if not succeeded]
        assert not failed, "\n".join(failed)
        return [value for _, value in outcomes]


class RankPool:
    """Worker processes that outlive a test: importing torch is the slow part. Dead ones are replaced."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def start(
        self,
        size: int,
        task: Callable[..., object],
        *arguments: object,
        capacity_bytes: int = 64 * 1024,
        timeout_s: float = 120.0,
        isa: str = "",
    ) -> Job:
        """Runs task(group, *arguments) on every rank of a new group."""
        self._workers = [worker for worker in self._workers if worker.process.is_alive()]
        while len(self._workers) < size:
            self._workers.append(_start_worker())
        job = Job(self._workers[:size])
        name = ""
        for rank, worker in enumerate(job.workers):
            worker.pipe.send(("join", (name, rank, size, capacity_bytes, timeout_s, isa)))
            succeeded, answer = job.outcome(rank)
            assert succeeded, answer
            name = answer
        for worker in job.workers:
            worker.pipe.send(("task", (task, arguments)))
        return job

    def run(self, size: int, task: Callable[..., object], *arguments: object, **options: Any) -> list[Any]:
        return self.start(size, task, *arguments, **options).values()

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _start_worker() -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    group: ShmGroup | None = None
    while True:
        try:
            kind, payload = pipe.recv()
        except EOFError:
            return
        try:
            if kind == "join":
                name, rank, size, capacity_bytes, timeout_s, isa = payload
                os.environ["PT_TRACK_FUSION_ISA"] = isa
                group = (
                    ShmGroup.create(size=size, capacity_bytes=capacity_bytes, timeout_s=timeout_s)
                    if rank == 0
                    else ShmGroup.attach(name, rank=rank, size=size, timeout_s=timeout_s)
                )
                pipe.send((True, group.name))
            else:
                task, arguments = payload
                assert group is not None
                try:
                    value = task(group, *arguments)
                finally:
                    group.close()
                pipe.send((True, value))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


# --- reference --------------------------------------------------------------------------------------------------------


def reference_fuse(inputs: list[torch.Tensor], op: str, residual: torch.Tensor | None) -> torch.Tensor:
    """The rules of plugins/include/pt/track_fusion.h in plain float32 steps."""
    total = inputs[0].float()
    for x in inputs[1:]:
        total = total + x.float()
    if op == "mean":
        total = total * torch.tensor(1.0, dtype=torch.float32).div(len(inputs))
    if residual is not None:
        total = total + residual.float()
    return total.to(inputs[0].dtype)


def reference_norm(h: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of the rounded h: 16 lanes, folded 8, 4, 2, 1."""
    rows = h.float().numpy()
    hidden = rows.shape[-1]
    padded = np.zeros((rows.shape[0], -(-hidden // 16) * 16), np.float32)
    padded[:, :hidden] = rows * rows
    lanes = np.zeros((rows.shape[0], 16), np.float32)
    for begin in range(0, padded.shape[1], 16):
        lanes += padded[:, begin : begin + 16]
    for half in (8, 4, 2, 1):
        lanes[:, :half] += lanes[:, half : 2 * half]
    mean_square = lanes[:, :1] / np.float32(hidden)
    inverse = np.float32(1.0) / np.sqrt(mean_square + np.float32(eps))
    return torch.from_numpy(rows * inverse * gamma.float().numpy()).to(h.dtype)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, expected {expected.dtype}"
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    different = (found.view(integer) != expected.view(integer)).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise AssertionError(
            f"{what}: {len(different)} of {found.numel()} elements differ, first at {at}: found {found[at].item()!r}, "
            f"expected {expected[at].item()!r}"
        )


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# --- tasks ------------------------------------------------------------------------------------------------------------


def check_fuse_cases(group: ShmGroup, shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...] = DTYPES) -> str:
    """Every dtype x mean/sum x residual x norm on each shape against the reference; a digest of all results."""
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(5)
    for tokens, hidden in shapes:
        for dtype in dtypes:
            inputs = [torch.randn(tokens, hidden, generator=generator).to(dtype) for _ in range(group.size)]
            added = torch.randn(tokens, hidden, generator=generator).to(dtype)
            gammas = torch.randn(2, hidden, generator=generator).to(dtype)
            for op in ("mean", "sum"):
                for residual in (None, added):
                    for gamma in (None, gammas[0], gammas, gammas.float()):
                        what = f"{op} {dtype} [{tokens}, {hidden}] residual={residual is not None}"
                        h, normed = group.fuse(inputs[group.rank], op=op, residual=residual, gamma=gamma, eps=1e-5)
                        assert_same_bits(h, reference_fuse(inputs, op, residual), what)
                        digest.update(bytes_of(h))
                        if gamma is None:
                            assert normed is None
                            continue
                        assert normed is not None
                        expected = [reference_norm(h, row, 1e-5) for row in gamma.reshape(-1, hidden)]
                        stacked = expected[0] if gamma.dim() == 1 else torch.stack(expected)
                        assert_same_bits(normed, stacked, f"{what} normed, gamma {list(gamma.shape)} {gamma.dtype}")
                        digest.update(bytes_of(normed))
    return digest.hexdigest()


def pass_specials_through(group: ShmGroup) -> list[str]:
    found = []
    for dtype in DTYPES:
        inf, nan = float("inf"), float("nan")
        x = torch.tensor([[inf, -inf, nan, inf, 0.0, -0.0]], dtype=dtype)
        if group.rank == 1:
            x[0, 3] = -inf
        h, _ = group.fuse(x, op="mean")
        found.append(str(h.float().tolist()) + bytes_of(h).hex())
    return found


def mix_operations(group: ShmGroup, seed: int, calls: int) -> str:
    """The same random sequence on all ranks; every result is checked; the digest covers what all ranks share."""
    rng = random.Random(seed)
    digest = hashlib.sha256()
    for call in range(calls):
        kind = rng.choice(["fuse", "all_reduce", "broadcast", "gather", "barrier"])
        rows, columns = rng.choice([0, 1, 3, 8]), rng.choice([1, 17, 64, 1000, 5003])
        root, dtype = rng.randrange(group.size), rng.choice(DTYPES)
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        parts = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(group.size)]
        mine = parts[group.rank].clone()
        what = f"call {call} {kind} {dtype} [{rows}, {columns}] root {root}"
        if kind == "fuse":
            shared, _ = group.fuse(mine)
            assert_same_bits(shared, reference_fuse(parts, "mean", None), what)
        elif kind == "all_reduce":
            shared = group.all_reduce(mine, out=mine)
            assert_same_bits(shared, reference_fuse(parts, "sum", None), what)
        elif kind == "broadcast":
            group.broadcast(mine, root)
            shared = mine
            assert_same_bits(shared, parts[root], what)
        elif kind == "gather":
            gathered = group.gather(mine, root)
            assert (gathered is not None) == (group.rank == root)
            shared = torch.cat(parts, dim=1)
            if gathered is not None:
                assert_same_bits(gathered, shared, what)
        else:
            group.barrier()
            continue
        digest.update(bytes_of(shared))
    return digest.hexdigest()


def move_bytes(group: ShmGroup) -> None:
    for root in range(group.size):
        for length in (0, 1, 7, 4096, 4097, 100_001):
            message = random.Random(length + root).randbytes(length)
            if group.rank == root:
                group.broadcast(message, root)
            else:
                buffer = bytearray(length)
                group.broadcast(buffer, root)
                assert bytes(buffer) == message
        part = torch.arange(6, dtype=torch.int64).reshape(2, 3) + 10 * group.rank
        gathered = group.gather(part, root)
        if gathered is not None:
            assert gathered[1].tolist() == [10 * rank + i for rank in range(group.size) for i in (3, 4, 5)]


def call_torch_operator(group: ShmGroup) -> tuple[int, str]:
    """The operator, eager and compiled for every number of rows, equals the method: compilations, and a digest."""
    from torch._dynamo.testing import CompileCounterWithBackend

    group.register("tracks")
    gammas = torch.arange(128, dtype=torch.float32).reshape(2, 64)
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, normed = torch.ops.pt_trtllm.track_fusion(x * 2, "tracks", "mean", x, gammas)
        h, _ = torch.ops.pt_trtllm.track_fusion(h.t().clone().t(), "tracks", "sum")  # laid out by columns
        return h, normed

    compiled = torch.compile(block, backend=counter, fullgraph=True)
    digest = hashlib.sha256()
    for rows in (3, 2, 17, 64):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(group.rank))
        torch._dynamo.mark_dynamic(x, 0)
        h, normed = group.fuse(x * 2, residual=x, gamma=gammas)
        assert normed is not None
        expected = group.fuse(h, op="sum")[0], normed
        for found in (block(x), compiled(x)):
            for result, wanted in zip(found, expected, strict=True):
                assert_same_bits(result.contiguous(), wanted, f"{rows} rows")
        digest.update(bytes_of(expected[0]))
    return counter.frame_count, digest.hexdigest()


def exchange_over_process_group(group: ShmGroup, meeting_place: str) -> list[list[bytes]]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may lead nowhere
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_place}", rank=group.rank, world_size=group.size
    )
    exchange = over_process_group(torch.distributed.group.WORLD)
    found = [exchange(bytes([group.rank]) * length) for length in (1, 64)]
    torch.distributed.destroy_process_group()
    return found


def reduce_for_ever(group: ShmGroup, timeout_s: float) -> None:
    x = torch.ones(4, 64)
    while True:
        group.all_reduce(x, timeout_s=timeout_s)


def wait_for_command(group: ShmGroup) -> tuple[float, int]:
    """An idle rank: processor seconds spent waiting, and the command."""
    command = torch.zeros(1, dtype=torch.int64)
    group.barrier()
    if group.rank == 0:
        time.sleep(1.5)
        command.fill_(42)
    start = time.process_time()
    group.broadcast(command, timeout_s=0)
    return time.process_time() - start, int(command.item())


def wait_with_signal_handler(group: ShmGroup) -> None:
    def stop(signum: int, frame: object) -> None:
        raise InterruptedError(f"signal {signum}")

    signal.signal(signal.SIGTERM, stop)
    pids = group.gather(torch.tensor([[os.getpid()]]))
    if pids is not None:
        time.sleep(0.2)
        os.kill(int(pids[0, 1]), signal.SIGTERM)
        time.sleep(3600)
    group.broadcast(bytearray(8), timeout_s=0)


def call_different_operations(group: ShmGroup) -> None:
    x = torch.ones(2, 8)
    group.barrier()
    if group.rank == 0:
        group.fuse(x)
    else:
        group.all_reduce(x)


def call_different_shapes(group: ShmGroup) -> None:
    group.fuse(torch.ones(2 + group.rank, 8, dtype=torch.bfloat16))


def abort_on_rank_one(group: ShmGroup) -> None:
    group.barrier()
    if group.rank == 1:
        group.abort("out of patience")
        return
    group.barrier(timeout_s=0)


def keep_failing(group: ShmGroup) -> list[str]:
    """After a time-out every later call repeats the reason at once, and arguments are still checked first."""
    if group.rank == 1:
        time.sleep(3600)
    errors = []
    for call in (group.barrier, lambda: group.fuse(torch.ones(1, 4)), lambda: group.gather(torch.ones(1, 4))):
        try:
            call()
        except Exception as error:
            errors.append(str(error))
    return errors
