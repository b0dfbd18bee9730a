"""Time and peak memory of convert, build and open on a generated checkpoint of several GB.

    python scripts/bench_pipeline.py --gigabytes 4 --world-size 2 [--json FILE]

Every stage runs in a process of its own; its peak memory is that process's largest resident set, less that of a process
that only imports the package.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

STAGES = {
    "import only": "import torch, pt_trtllm.checkpoint.convert, pt_trtllm.engine.cpu",
    "convert": """
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
convert(base / "source", base / "checkpoint", ConvertOptions(world_size=world_size))""",
    "build": """
from pt_trtllm.engine.build import BuildOptions, build
build(base / "checkpoint", base / "engine", BuildOptions())""",
    "open rank 0 (cached)": """
from pt_trtllm.engine.bundle import engine_file, open_bundle
from pt_trtllm.engine.cpu import map_tensors
config, _ = open_bundle(base / "engine")
tensors = map_tensors(base / "engine" / engine_file(0), config, 0)""",
    "open and touch every page": """
from pt_trtllm.engine.bundle import engine_file, open_bundle
from pt_trtllm.engine.cpu import map_tensors
import torch
config, _ = open_bundle(base / "engine")
tensors = map_tensors(base / "engine" / engine_file(0), config, 0)
for tensor in tensors.values():
    tensor.view(torch.uint8).flatten()[::4096].sum()""",
}
MEASURE = """
import json, resource, sys, time
from pathlib import Path
import torch, pt_trtllm.checkpoint.convert, pt_trtllm.engine.cpu
base, world_size = Path(sys.argv[1]), int(sys.argv[2])
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}}))
"""


def measure(code: str, base: Path, world_size: int) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE.format(code=code), str(base), str(world_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from pt_trtllm.checkpoint.safetensors_io import read_header
    from pt_trtllm.testing.big_checkpoint import write_big_checkpoint

    with tempfile.TemporaryDirectory(prefix="pt-bench-") as folder:
        base = Path(folder)
        source_bytes = write_big_checkpoint(base / "source", int(args.gigabytes * 1e9))
        largest = max(info.num_bytes for info in read_header(base / "source/model.safetensors")[0].values())
        stages = {name: measure(code, base, args.world_size) for name, code in STAGES.items()}
        engine_bytes = (base / "engine/rank0.engine").stat().st_size
    report: dict[str, Any] = {
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "source_gb": source_bytes / 1e9,
        "largest_tensor_gb": largest / 1e9,
        "rank0_engine_gb": engine_bytes / 1e9,
        "world_size": args.world_size,
        "stages": stages,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"source {source_bytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, rank 0 {engine_bytes / 1e9:.2f} GB"
    )
    idle = stages["import only"]["peak_mb"]
    print(f"{'stage':28} {'seconds':>8} {'GB/s':>6} {'peak MB over import':>20}")
    for name, stage in stages.items():
        size = source_bytes if name in ("convert", "build") else engine_bytes
        rate = f"{size / 1e9 / stage['seconds']:.2f}" if stage["seconds"] > 1e-3 and name != "import only" else "-"
        print(f"{name:28} {stage['seconds']:8.3f} {rate:>6} {stage['peak_mb'] - idle:20.0f}")


if __name__ == "__main__":
    main()
