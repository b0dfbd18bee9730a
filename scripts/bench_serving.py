#!/usr/bin/env python3
"""What serving costs: streams from a Triton server against streams from `LLM` on the same engine.

Usage: scripts/bench_serving.py (ENGINE_DIR | --shape large) [--streams 1,8] [--max-tokens N] [--prompt-len N]
       [--apart-ms MS] [--world-size N] [--repeats N] [--json FILE]

A shape is one of `pt-trtllm bench`: random weights, parallel tracks over two ranks, with the example's tokenizer.

Streams of one round begin --apart-ms after each other on both sides, so that both batch them alike. Both sides ask with
the same token ids, ignore end tokens, and take turns, so that a busy machine disturbs both alike.
TTFT is from asking to the first token, TPOT the mean time between an answer's tokens from there; medians over answers.
Every number comes from a client's side: one thread per stream and one connection for the server, one coroutine per
stream for `LLM`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pt_trtllm import LLM, RuntimeOptions, SamplingParams
from pt_trtllm.bench.shapes import SHAPES, ShapeOptions, make_engines
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.repository import DeployOptions, deploy
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.serving.server_options import ServerOptions

EXAMPLE = Path(__file__).parents[1] / "examples/tiny-pt"
Times = list[float]
"""When each token arrived, in seconds after asking."""


def served(client: Client, prompts: list[list[int]] | list[str], params: SamplingParams, apart_s: float) -> list[Times]:
    def ask(index: int) -> Times:
        time.sleep(index * apart_s)
        start, times = time.perf_counter(), []
        for chunk in client.stream(prompts[index], params):
            times += [time.perf_counter() - start] * len(chunk.token_ids)
        return times

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, range(len(prompts))))


def in_process(llm: LLM, prompts: list[list[int]], params: SamplingParams, apart_s: float) -> list[Times]:
    async def ask(index: int, prompt: list[int]) -> Times:
        await asyncio.sleep(index * apart_s)
        start = time.perf_counter()
        return [time.perf_counter() - start async for _ in llm.generate_async(prompt, params)]

    async def everyone() -> list[Times]:
        return await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts)))

    return asyncio.run(everyone())


def summary(answers: list[Times]) -> dict[str, float]:
    return {
        "ttft_ms": statistics.median(times[0] for times in answers) * 1e3,
        "tpot_ms": statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in answers) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("engine_dir", type=Path, nargs="?")
    what.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--apart-ms", type=float, default=0.0)
    parser.add_argument("--world-size", type=int, default=2, help="of a shape; 1 makes a plain model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    params = SamplingParams(max_tokens=given.max_tokens, ignore_eos=True)
    with tempfile.TemporaryDirectory() as work:
        engine_dir = given.engine_dir or random_engine(given.shape, given.world_size, Path(work))
        deploy(engine_dir, None, Path(work) / "repository", DeployOptions(enable_block_reuse=False))
        options = ServerOptions(grpc_port=0, http_port=0, metrics_port=0)
        with (
            TritonServer(Path(work) / "repository", options) as server,
            LLM(engine_dir, options=RuntimeOptions(enable_block_reuse=False)) as llm,
            Client(server.grpc_url) as client,
        ):
            rows = [measure(client, llm, int(count), params, given) for count in given.streams.split(",")]
    print(f"{'streams':>7} {'path':<18} {'TTFT ms':>9} {'TPOT ms':>9} {'TTFT added':>11} {'TPOT added':>11}")
    for row in rows:
        base = row["paths"]["in process"]
        for name, value in row["paths"].items():
            added = f"{value['ttft_ms'] - base['ttft_ms']:>8.2f} ms {value['tpot_ms'] / base['tpot_ms'] - 1:>10.1%}"
            print(f"{row['streams']:>7} {name:<18} {value['ttft_ms']:>9.2f} {value['tpot_ms']:>9.3f} {added}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(client: Client, llm: LLM, streams: int, params: SamplingParams, given: argparse.Namespace) -> dict:
    """One row per number of streams; every path gets the same prompts, and nothing of a prompt is reused."""
    apart_s = given.apart_ms / 1e3
    paths: dict[str, Callable[[list[list[int]], list[str]], list[Times]]] = {
        "in process": lambda prompts, _: in_process(llm, prompts, params, apart_s),
        "Triton tensorrt_llm": lambda prompts, _: served(client, prompts, params, apart_s),
        "Triton ensemble": lambda _, texts: served(client, texts, params, apart_s),
    }
    answers: dict[str, list[Times]] = {name: [] for name in paths}
    assert llm.tokenizer is not None
    for repeat in range(given.repeats + 1):
        texts = [words(100 * repeat + index, given.prompt_len) for index in range(streams)]
        prompts = [llm.tokenizer.encode(text) for text in texts]
        for name, ask in paths.items():
            times = ask(prompts, texts)
            answers[name] += times if repeat else []  # the first round warms up
    return {"streams": streams, "paths": {name: summary(times) for name, times in answers.items()}}


def random_engine(shape: str, world_size: int, folder: Path) -> Path:
    limits = BuildLimits(max_batch_size=8, max_seq_len=512, max_num_tokens=512)
    models = ("pt",) if world_size > 1 else ("one",)
    options = ShapeOptions(shape=SHAPES[shape], models=models, world_size=world_size)
    ((_, engine_dir),) = make_engines(options, limits, folder)
    (engine_dir / "tokenizer").mkdir()
    for path in EXAMPLE.glob("tokenizer*.json"):
        shutil.copy(path, engine_dir / "tokenizer")
    return engine_dir


def words(number: int, length: int) -> str:
    """A text of about this many tokens, of its own."""
    names = ("house", "letter", "sister", "morning", "friend", "garden", "evening", "walk")
    return " ".join(["the", *(names[(number // 8**i + i) % 8] for i in range(length - 2))])


if __name__ == "__main__":
    main()
