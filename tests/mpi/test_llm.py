"""The Python API over real ranks: many requests at once, each answered as if it were alone."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pt_trtllm import LLM, RuntimeOptions, SamplingParams
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.errors import CommunicationError, ConfigError
from pt_trtllm.processes import is_running
from pt_trtllm.testing.cases import BASE
from pt_trtllm.testing.reference import Reference, make_reference

pytestmark = pytest.mark.mpi

# One below GEMM_MIN_ROWS: how many tokens a step gets depends on when requests arrive, and the last bits of an answer
# on which kernel multiplies them.
LIMITS = BuildLimits(max_batch_size=8, max_seq_len=256, max_num_tokens=63)
SMALL_CACHE = RuntimeOptions(max_tokens_in_paged_kv_cache=512, scheduler_policy="max_utilization")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(BASE, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def engines(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("engines")
    for size in (1, 2, 4):
        convert(reference.folder, folder / f"c{size}", ConvertOptions(world_size=size))
        build(folder / f"c{size}", folder / str(size), BuildOptions(limits=LIMITS))
    return {size: folder / str(size) for size in (1, 2, 4)}


@pytest.fixture(scope="module")
def llm(engines: dict[int, Path]) -> Iterator[LLM]:
    with LLM(engines[2]) as running:
        yield running


def ids(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple[int, ...]]:
    return [result.outputs[0].token_ids for result in llm.generate(prompts, params)]


def mixed(count: int, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of all lengths, some with a common beginning, half of them sampled with a seed of their own."""
    rng = random.Random(seed)
    common = [rng.randrange(97) for _ in range(70)]
    prompts, params = [], []
    for index in range(count):
        own = [rng.randrange(97) for _ in range(rng.randrange(1, 60))]
        prompts.append(common[: rng.choice((0, 33, 70))] + own)
        temperature = rng.choice((None, 0.8))
        params.append(SamplingParams(max_tokens=rng.randrange(1, 24), temperature=temperature, seed=index))
    return prompts, params


def test_generate_gives_the_references_answers(llm: LLM, reference: Reference) -> None:
    results = llm.generate(reference.prompts, SamplingParams(max_tokens=8))
    assert [list(result.outputs[0].token_ids) for result in results] == reference.continuations
    assert all(result.finished and result.outputs[0].finish_reason == "length" for result in results)
    (single,) = llm.generate(reference.prompts[0], SamplingParams(max_tokens=8))
    assert list(single.outputs[0].token_ids) == reference.continuations[0]


def test_streaming_grows_to_the_same_answer(llm: LLM, reference: Reference) -> None:
    async def collect(prompt: list[int]) -> list[tuple[int, ...]]:
        return [out.outputs[0].token_ids async for out in llm.generate_async(prompt, SamplingParams(max_tokens=8))]

    async def all_at_once() -> list[list[tuple[int, ...]]]:
        return await asyncio.gather(*map(collect, reference.prompts))

    for pieces, continuation in zip(asyncio.run(all_at_once()), reference.continuations, strict=True):
        assert [list(piece) for piece in pieces] == [continuation[:count] for count in range(1, 9)]


def test_leaving_a_stream_early_frees_what_it_held(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.generate_async([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
        async for out in stream:
            if len(out.outputs[0].token_ids) == 3:
                break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    llm.generate([[5]], SamplingParams(max_tokens=1))  # after the cancellation, in the order of messages
    stats = llm.stats()
    assert (stats["kv_blocks_used"], stats["running"], stats["waiting"]) == (0, 0, 0)


def test_answers_do_not_depend_on_company(llm: LLM) -> None:
    prompts, params = mixed(12, seed=5)
    together = ids(llm, prompts, params)
    alone = [ids(llm, [prompt], [own])[0] for prompt, own in zip(prompts, params, strict=True)]
    assert together == alone


def test_a_common_beginning_is_reused_and_changes_nothing(llm: LLM, engines: dict[int, Path]) -> None:
    prompt = [(7 * i) % 97 for i in range(100)]
    params = SamplingParams(max_tokens=6)
    before = llm.stats()["reused_tokens"]
    first, second = (llm.generate([prompt], params)[0].outputs[0].token_ids for _ in range(2))
    longer = llm.generate([[*prompt, 3]], params)[0].outputs[0].token_ids
    assert llm.stats()["reused_tokens"] - before == 96 + 96
    with LLM(engines[2], options=RuntimeOptions(enable_block_reuse=False)) as forgetful:
        assert forgetful.generate([prompt], params)[0].outputs[0].token_ids == first == second
        assert forgetful.generate([[*prompt, 3]], params)[0].outputs[0].token_ids == longer
        assert forgetful.stats()["reused_tokens"] == 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_two_hundred_mixed_requests_with_cancellations_in_little_memory(
    engines: dict[int, Path], world_size: int
) -> None:
    prompts, params = mixed(200, seed=7)
    rng = random.Random(8)
    with LLM(engines[world_size], options=SMALL_CACHE) as llm:
        expected = ids(llm, prompts, params)

        async def ask(index: int, stop_after: int | None) -> tuple[int, ...]:
            last: tuple[int, ...] = ()
            async for out in llm.generate_async(prompts[index], params[index]):
                last = out.outputs[0].token_ids
                if stop_after is not None and len(last) >= stop_after:
                    break
            return last

        async def everyone() -> list[tuple[int, ...]]:
            stops = [rng.choice((None, None, None, 1, 5)) for _ in prompts]
            return await asyncio.gather(*(ask(index, stop) for index, stop in enumerate(stops)))

        for found, whole in zip(asyncio.run(everyone()), expected, strict=True):
            assert found == whole[: len(found)]
            assert found
        llm.generate([[5]], SamplingParams(max_tokens=1))
        stats = llm.stats()
    assert (stats["kv_blocks_used"], stats["running"], stats["waiting"]) == (0, 0, 0)
    assert stats["preemptions"] > 0
    assert stats["sync_points_per_forward"]["track_fusion"] == (2 if world_size > 1 else 0)


def test_a_request_that_cannot_fit_is_refused_and_others_go_on(engines: dict[int, Path], reference: Reference) -> None:
    with LLM(engines[1], options=RuntimeOptions(max_tokens_in_paged_kv_cache=64)) as llm:
        with pytest.raises(ConfigError, match="the KV cache has 2"):
            llm.generate([[1] * 40], SamplingParams(max_tokens=100))
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            llm.generate([[999]])
        results = llm.generate(reference.prompts, SamplingParams(max_tokens=8))
        assert [list(result.outputs[0].token_ids) for result in results] == reference.continuations


def test_a_killed_rank_fails_every_request_in_flight_and_all_later_ones(engines: dict[int, Path]) -> None:
    with LLM(engines[2]) as llm:
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                llm.generate([[1, 2]], SamplingParams(max_tokens=250, ignore_eos=True))
            except CommunicationError as error:
                failures.append(error)

        async def first_tokens() -> int:
            async for out in llm.generate_async([3], SamplingParams(max_tokens=2)):
                return len(out.outputs[0].token_ids)
            return 0

        assert asyncio.run(first_tokens()) == 1
        victim = _pid_of_rank(llm, 1)
        os.kill(victim, signal.SIGSTOP)  # so that the answers cannot be ready before the end
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        os.kill(victim, signal.SIGKILL)
        for thread in threads:
            thread.join(timeout=240)
        assert len(failures) == 4
        assert f"rank 1 (pid {victim}) died without a message" in str(failures[0])
        for ask_again in (lambda: llm.generate([[1]]), llm.stats, llm.stats):
            with pytest.raises(CommunicationError, match="died without a message"):
                ask_again()


def _pid_of_rank(llm: LLM, rank: int) -> int:
    import json

    return int(json.loads((llm._world.folder / f"rank{rank}.status").read_text())["pid"])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("users_own", [None, "77"])
def test_ranks_are_told_not_to_spin_for_long_unless_the_user_said_how_long(
    engines: dict[int, Path], monkeypatch: pytest.MonkeyPatch, world_size: int, users_own: str | None
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if users_own:
        monkeypatch.setenv("GOMP_SPINCOUNT", users_own)
    with LLM(engines[world_size]) as llm:
        for rank in range(world_size):
            environment = Path(f"/proc/{_pid_of_rank(llm, rank)}/environ").read_bytes().split(b"\0")
            assert f"GOMP_SPINCOUNT={users_own or 1000}".encode() in environment


def test_closing_leaves_no_process_and_no_file(engines: dict[int, Path]) -> None:
    llm = LLM(engines[2])
    folder = llm._world.folder
    pids = [_pid_of_rank(llm, rank) for rank in range(2)]
    llm.close()
    assert not folder.exists()
    assert not any(is_running(pid) for pid in pids)
    with pytest.raises(CommunicationError, match="the engine was closed"):
        llm.generate([[1]])
