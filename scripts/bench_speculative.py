#!/usr/bin/env python3
"""What guessing ahead brings: time per token with n-gram guesses against plain decoding, on the same engine.

Usage: scripts/bench_speculative.py (ENGINE_DIR | --shape SHAPE) [--batch-sizes 1,4] [--max-tokens N] [--repeats N]
       [--json FILE]

A shape is one of `pt-trtllm bench`, with random weights over two ranks. Such a model soon repeats itself, which is the
best there is for n-grams; an engine of the trained example says what plain English brings. Both ways are greedy, give
the same tokens (checked), and take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from pt_trtllm import LLM, RuntimeOptions, SamplingParams
from pt_trtllm.bench.shapes import SHAPES, ShapeOptions, make_engines
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.runtime.speculative.config import SpeculativeConfig

PROMPTS = ("It is a truth", "She had never been", "The evening was", "My dear sister", "He walked to the house",
           "They were all", "Mr. Darcy said", "In the morning")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("engine_dir", type=Path, nargs="?")
    what.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    ways = {"plain": None} | {f"ngram, {k}": SpeculativeConfig(method="ngram", max_draft_len=k) for k in (2, 4)}
    with tempfile.TemporaryDirectory() as work:
        engine_dir = given.engine_dir or random_engine(given.shape, Path(work))
        sizes = [int(size) for size in given.batch_sizes.split(",")]
        rows = [row for size in sizes for row in measure(engine_dir, ways, size, given)]
    print(f"{'batch':>5} {'way':<10} {'ms/token':>9} {'against plain':>14} {'accepted':>9}")
    for row in rows:
        name, ratio = f"{row['batch']:>5} {row['way']:<10}", f"{row['ratio']:.2f}x"
        print(f"{name} {row['ms_per_token']:>9.3f} {ratio:>14} {row['accepted']:>9}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(engine_dir: Path, ways: dict[str, SpeculativeConfig | None], batch: int, given: argparse.Namespace) -> list:
    """One engine after the other: two that wait for work would take each other's cores."""
    params = SamplingParams(max_tokens=given.max_tokens, ignore_eos=True)
    times: dict[str, list[float]] = {way: [] for way in ways}
    accepted, answers = {"plain": ""}, {}
    for repeat in range(given.repeats):
        for way, speculative in ways.items():
            with LLM(engine_dir, options=RuntimeOptions(speculative=speculative)) as llm:
                prompts = [prompts_of(llm, index) for index in range(batch)]
                llm.generate(prompts, SamplingParams(max_tokens=4))
                start = time.perf_counter()
                results = llm.generate(prompts, params)
                times[way].append((time.perf_counter() - start) / given.max_tokens)
                stats = llm.stats()
            tokens = [result.outputs[0].token_ids for result in results]
            assert answers.setdefault("tokens", tokens) == tokens, f"{way} gives other tokens in repeat {repeat}"
            if speculative is not None:
                accepted[way] = f"{stats['accepted_tokens'] / max(1, stats['drafted_tokens']):.0%}"
    middle = {way: statistics.median(values) * 1e3 for way, values in times.items()}
    return [
        {"batch": batch, "way": way, "ms_per_token": middle[way], "ratio": middle["plain"] / middle[way],
         "accepted": accepted[way]}
        for way in ways
    ]  # fmt: skip


def prompts_of(llm: LLM, index: int) -> list[int]:
    if llm.tokenizer is not None:
        return llm.tokenizer.encode(PROMPTS[index % len(PROMPTS)])
    return [(7 * index + 3 * position) % 256 for position in range(16)]


def random_engine(shape: str, folder: Path) -> Path:
    limits = BuildLimits(max_batch_size=8, max_seq_len=512, max_num_tokens=512)
    ((_, engine_dir),) = make_engines(ShapeOptions(shape=SHAPES[shape], models=("pt",)), limits, folder)
    return engine_dir


if __name__ == "__main__":
    main()
