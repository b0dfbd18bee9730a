"""Paged attention of the native library beside torch: SDPA per sequence over contiguous keys and values, bfloat16.

python scripts/bench_attention.py [--threads 1] [--dtypes bfloat16 int8] [--rounds 7] [--cpu-time] [--json FILE]

One call stores the new keys and values and attends, for one layer. Decode walks over so many layers that keys and
values come from memory, not from the last-level cache; its GB/s counts the keys and values of the context once, and is
set against the read bandwidth measured between the same rounds. Prefill counts the products below the diagonal only.
torch needs no block tables here, which is to its favour.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pt_trtllm.network.attention_library import isa
from pt_trtllm.network.paged_kv import PagedKvCache, RaggedBatch

CONTEXTS = [128, 512, 2048, 8192]
BATCHES = [1, 8]
PREFILLS = [512, 2048]
BLOCK_TOKENS = 32
FOOTPRINT_BYTES = 192 << 20
"""Keys and values of all layers together: several times a last-level cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    tracks: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = [
    Shape(name="PT, 4 tracks, 4 heads of 128, 1 key head", tracks=4, heads=4, kv_heads=1, head_dim=128),
    Shape(name="Llama, 16 heads of 128, 8 key heads", tracks=1, heads=16, kv_heads=8, head_dim=128),
]


class Case:
    """`batch` sequences that add `new` tokens after `past`, in both implementations, over `layers` layers."""

    def __init__(self, shape: Shape, batch: int, past: int, new: int, layers: int, dtype: torch.dtype, threads: int):
        self.shape, self.batch, self.past, self.new, self.layers = shape, batch, past, new, layers
        total = past + new
        columns = -(-total // BLOCK_TOKENS)
        tables = torch.randperm(batch * columns, dtype=torch.int32).view(batch, columns)
        self.paged = PagedKvCache(
            num_layers=layers, num_blocks=batch * columns, num_tracks=shape.tracks, num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim, block_tokens=BLOCK_TOKENS, dtype=dtype, num_threads=threads,
        )  # fmt: skip
        region = (shape.tracks, batch, shape.kv_heads, total, shape.head_dim)
        self.keys = [torch.zeros(region, dtype=torch.bfloat16) for _ in range(layers)]
        self.values = [torch.zeros(region, dtype=torch.bfloat16) for _ in range(layers)]
        tokens = (shape.tracks, batch * total, shape.kv_heads, shape.head_dim)
        key, value = torch.randn(tokens, dtype=torch.bfloat16), torch.randn(tokens, dtype=torch.bfloat16)
        everything = RaggedBatch([(total, 0)] * batch, tables)
        for layer in range(layers):
            self.paged.write(layer, everything, key, value)
            for pool, source in ((self.keys, key), (self.values, value)):
                pool[layer].copy_(source.unflatten(1, (batch, total)).transpose(2, 3))
        self.tables = tables
        heads = shape.heads + 2 * shape.kv_heads
        qkv = torch.randn(shape.tracks, batch * new, heads, shape.head_dim, dtype=torch.bfloat16)
        self.query, self.key, self.value = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=2)

    def native(self) -> torch.Tensor:
        step = RaggedBatch([(self.new, self.past)] * self.batch, self.tables)
        for layer in range(self.layers):
            self.paged.write(layer, step, self.key, self.value)
            output = self.paged.attend(layer, step, self.query)
        return output

    def torch(self) -> torch.Tensor:
        for layer in range(self.layers):
            output = torch.empty_like(self.query)
            for s in range(self.batch):
                rows = slice(s * self.new, (s + 1) * self.new)
                keys, values = self.keys[layer][:, s], self.values[layer][:, s]
                keys[:, :, self.past :] = self.key[:, rows].transpose(1, 2)
                values[:, :, self.past :] = self.value[:, rows].transpose(1, 2)
                output[:, rows] = functional.scaled_dot_product_attention(
                    self.query[:, rows].transpose(1, 2),
                    keys,
                    values,
                    is_causal=self.new > 1,  # nothing is hidden from a single token
                    enable_gqa=self.shape.heads != self.shape.kv_heads,
                ).transpose(1, 2)
        return output.flatten(2)


def timed(call: Callable[[], object]) -> float:
    start = CLOCK()
    call()
    return CLOCK() - start


def measure(case: Case, rounds: int, tolerance: float) -> tuple[float, float, float]:
    """Median seconds per layer of ours and torch's, alternating, and median bytes per second of reading memory."""
    found, expected = case.native().double(), case.torch().double()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{case.shape.name}, batch {case.batch}, past {case.past}: relative error {error:.3g}")
    ours, theirs, bandwidth = [], [], []
    for _ in range(rounds):
        ours.append(timed(case.native) / case.layers)
        theirs.append(timed(case.torch) / case.layers)
        bandwidth.append(MEMORY.nbytes / min(timed(MEMORY.sum) for _ in range(2)))
    return statistics.median(ours), statistics.median(theirs), statistics.median(bandwidth)


CLOCK = time.perf_counter
MEMORY = torch.ones(32 << 20)
"""128 MiB of float32: its sum is bound by reading."""


def run_shape(shape: Shape, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tolerance = 0.03 if dtype == torch.int8 else 0.01
    label = {"shape": shape.name, "cache": str(dtype).removeprefix("torch.")}
    for batch in BATCHES:
        for context in CONTEXTS:
            per_head = shape.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
            num_bytes = 2 * batch * context * shape.tracks * shape.kv_heads * per_head
            layers = max(1, FOOTPRINT_BYTES // num_bytes)
            case = Case(shape, batch, context - 1, 1, layers, dtype, options.threads)
            ours, theirs, bandwidth = measure(case, options.rounds, tolerance)
            numbers = {"ours_gbs": num_bytes / ours / 1e9, "read_gbs": bandwidth / 1e9}
            rows.append(label | {"kind": "decode", "batch": batch, "tokens": context, "ours_us": ours * 1e6,
                                 "torch_us": theirs * 1e6, "ratio": theirs / ours} | numbers)  # fmt: skip
    for tokens in PREFILLS:
        case = Case(shape, 1, 0, tokens, 1, dtype, options.threads)
        ours, theirs, _ = measure(case, options.rounds, tolerance)
        flop = 4 * shape.tracks * shape.heads * shape.head_dim * tokens * (tokens + 1) / 2
        rows.append(label | {"kind": "prefill", "batch": 1, "tokens": tokens, "ours_us": ours * 1e6,
                             "torch_us": theirs * 1e6, "ratio": theirs / ours, "ours_gflops": flop / ours / 1e9,
                             "torch_gflops": flop / theirs / 1e9})  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kind"] == "decode":
            extra = f"{row['ours_gbs']:6.1f} GB/s of {row['read_gbs']:.1f}"
        else:
            extra = f"{row['ours_gflops']:6.1f} GFLOP/s, torch {row['torch_gflops']:.1f}"
        print(
            f"{row['kind']:>8} batch {row['batch']} tokens {row['tokens']:>5} {row['cache']:>9}:"
            f" {row['ours_us']:>9.1f} us, torch {row['torch_us']:>9.1f} us, torch / ours {row['ratio']:>5.2f}, {extra}",
            flush=True,
        )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"], help="of our cache; torch's is bfloat16")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the one thread: leaves out when others had the core"
    )
    options = parser.parse_args()
    if options.cpu_time:
        if options.threads != 1:
            parser.error("--cpu-time is for one thread")
        global CLOCK
        CLOCK = time.thread_time
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    hardware = {
        "cpu": processor(), "cores": os.cpu_count(), "threads": options.threads, "load": os.getloadavg()[0],
        "clock": CLOCK.__name__, "isa": isa(), "python": sys.version.split()[0], "torch": torch.__version__,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in hardware.items()))
    rows = []
    for shape in SHAPES:
        for dtype in options.dtypes:
            print(f"\n{shape.name}, cache {dtype}")
            new = run_shape(shape, getattr(torch, dtype), options)
            show(new)
            rows += new
    hardware["load_after"] = os.getloadavg()[0]
    print(f"\nload before {hardware['load']:.1f}, after {hardware['load_after']:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
