"""Weight-streaming products beside torch's kernels and the memory's read speed, in one process.

python scripts/bench_linear.py [--threads 1 2] [--rows 1 2 4 8 16] [--repeats 15] [--json FILE]

Weights of each shape are taken in turn from a pool larger than the last-level cache, so every call reads memory.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pt_trtllm.checkpoint.quantize import Quantization, quantize_rows, unpack_int4
from pt_trtllm.network.native_linear import NativeLinear, copy_to_huge_pages, isa

SHAPES = [(2048, 2048), (5632, 2048), (11264, 2048), (2048, 5632)]
"""(out, in)"""
POOL_BYTES = 160 << 20
KINDS = ["bf16", "int8", "int4-128", "int4-32"]

Call = Callable[[torch.Tensor, int], torch.Tensor]


def median_s(call: Callable[[int], object], repeats: int) -> float:
    """Median over single calls, after one round to warm up; `call` gets the call's number."""
    times = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def read_gb_s(repeats: int) -> float:
    """Fastest read of a huge-page buffer: the kernels' own loop with one row, over float32 (no arithmetic to speak of)
    and torch's sum, whichever is faster."""
    buffer = copy_to_huge_pages(torch.zeros(1, POOL_BYTES // 4 // 4096, 4096))
    linear, x = NativeLinear(buffer), torch.zeros(1, 1, 4096)
    words = buffer.view(torch.int64)
    fastest = min(median_s(lambda _: linear(x), repeats), median_s(lambda _: words.sum(), repeats))
    return buffer.nbytes / fastest / 1e9


def make(kind: str, out: int, columns: int, huge: bool) -> tuple[Call, Call | None, int, int]:
    """(ours, torch's, bytes of one weight, weights in the pool)."""
    place = copy_to_huge_pages if huge else torch.clone
    if kind == "bf16":
        weight = torch.randn(out, columns).bfloat16()
        count = max(2, POOL_BYTES // weight.nbytes)
        linears = [NativeLinear(place(weight)[None]) for _ in range(count)]
        return (
            lambda x, i: linears[i % count](x),
            lambda x, i: functional.linear(x[0], linears[i % count].weight[0]),
            weight.nbytes,
            count,
        )
    group_size = int(kind.partition("-")[2] or 128)
    quantization = Quantization(method="int8_wo" if kind == "int8" else "int4_wo", group_size=group_size)
    parts = quantize_rows(torch.randn(out, columns), torch.bfloat16, quantization)
    num_bytes = sum(part.nbytes for part in parts)
    count = max(2, POOL_BYTES // num_bytes)
    if kind == "int8":
        scale = parts[1].flatten()
        linears = [NativeLinear(place(parts[0])[None], scale[None]) for _ in range(count)]
        return (
            lambda x, i: linears[i % count](x),
            lambda x, i: torch.ops.aten._weight_int8pack_mm(x[0], linears[i % count].weight[0], scale),
            num_bytes,
            count,
        )
    linears = [NativeLinear(*(place(part)[None] for part in parts)) for _ in range(count)]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(parts[0]).to(torch.int32), 1)
    torch_weights = [packed.clone() for _ in range(count)]
    scale_zero = torch.stack((parts[1], parts[2]), dim=-1).transpose(0, 1).contiguous()
    return (
        lambda x, i: linears[i % count](x),
        lambda x, i: torch.ops.aten._weight_int4pack_mm_for_cpu(x[0], torch_weights[i % count], group_size, scale_zero),
        num_bytes,
        count,
    )


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        limit = read_gb_s(options.repeats)
        print(f"\n{threads} thread(s), memory read {limit:.1f} GB/s, load {os.getloadavg()[0]:.1f}")
        print(
            "| shape | kind | rows | us | GB/s | of read | torch us | torch / ours | tokens vs 1 row | time vs bf16 |"
        )
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for out, columns in SHAPES:
            bf16_s: dict[int, float] = {}
            for kind in KINDS:
                ours, theirs, num_bytes, _ = make(kind, out, columns, not options.small_pages)
                first_s = 0.0
                for rows in options.rows:
                    x = torch.randn(1, rows, columns).bfloat16()
                    ours_s = median_s(lambda i, x=x, call=ours: call(x, i), options.repeats)  # type: ignore[misc]
                    theirs_s = median_s(lambda i, x=x, call=theirs: call(x, i), options.repeats)  # type: ignore[misc]
                    first_s = first_s or ours_s / rows * options.rows[0]
                    if kind == "bf16":
                        bf16_s[rows] = ours_s
                    row = {
                        "threads": threads,
                        "shape": [out, columns],
                        "kind": kind,
                        "rows": rows,
                        "us": ours_s * 1e6,
                        "gb_s": num_bytes / ours_s / 1e9,
                        "of_read": num_bytes / ours_s / 1e9 / limit,
                        "torch_us": theirs_s * 1e6,
                        "speedup_over_torch": theirs_s / ours_s,
                        "tokens_vs_one_row": rows * first_s / ours_s,
                        "faster_than_bf16": bf16_s[rows] / ours_s,
                    }
                    results.append(row)
                    print(
                        f"| {out} x {columns} | {kind} | {rows} | {row['us']:.0f} | {row['gb_s']:.1f} "
                        f"| {row['of_read']:.0%} | {row['torch_us']:.0f} | {row['speedup_over_torch']:.2f} "
                        f"| {row['tokens_vs_one_row']:.2f} | {row['faster_than_bf16']:.2f} |",
                        flush=True,
                    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small-pages", action="store_true", help="keep our weights in ordinary pages")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
    print(f"{model}, {os.cpu_count()} cores, {isa()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"load {os.getloadavg()[0]:.1f} at the start; anything above 0 from others lowers the numbers")
    with torch.inference_mode():
        results = measure(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
