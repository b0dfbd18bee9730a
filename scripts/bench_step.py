"""Where the time of a decode step goes on rank 0: kernels, collectives, and everything else.

python scripts/bench_step.py [--shape small] [--world-size 2] [--batch 1 8] [--steps 200] [--plain] [--json FILE]

Makes an engine of random weights, of parallel tracks for several ranks, and starts the ranks with mpirun, each bound
to its cores. Rank 0 steps its `EngineCore`: scheduling, broadcast, forward pass, sampling. Kernels are timed where
they are called in the program library (and around the head's product); collectives by the communicator, waiting for
the other ranks included. Shown are medians over steps, and the fastest step; `outside kernels` leaves collectives
out, so that waiting on a busy machine does not dilute it. `--plain` runs the PyTorch lowering: its kernels are called
from Python and not timed.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.bench.shapes import SHAPES, ShapeOptions, make_engines
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.engine.bundle import BuildLimits, open_bundle
from pt_trtllm.engine.cpu import CpuEngine
from pt_trtllm.network.torch_linear import Linear
from pt_trtllm.runtime.core import EngineCore, follow
from pt_trtllm.runtime.launch import launch_command
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.worker import connect, open_engine, share_cores

WARM_UP = 20


class TimedLinear:
    def __init__(self, linear: Linear) -> None:
        self._linear, self.seconds = linear, 0.0

    @property
    def out_features(self) -> int:
        return self._linear.out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        y = self._linear(x)
        self.seconds += time.perf_counter() - start
        return y


def run_rank(engine_dir: Path, options: argparse.Namespace) -> None:
    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_LOCAL_{name}"]) for name in ("RANK", "SIZE"))
    share_cores(rank, size)
    config, _ = open_bundle(engine_dir)
    comm = connect(config.mapping)
    engine, runtime = open_engine(engine_dir, config, comm, RuntimeOptions(enable_block_reuse=False))
    assert isinstance(engine, CpuEngine)
    if options.plain:
        engine.program = None
    head = TimedLinear(engine.weights.head)
    object.__setattr__(engine.weights, "head", head)
    if comm.rank:
        follow([engine])
    else:
        core = EngineCore(engine, runtime)
        results = [measure(core, engine, head, batch, options) for batch in options.batch]
        core.stop()
        print(json.dumps(results), flush=True)
    comm.barrier()
    comm.close()


def measure(
    core: EngineCore, engine: CpuEngine, head: TimedLinear, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    vocab_size = engine.config.checkpoint.model.vocab_size
    params = SamplingParams(max_tokens=options.steps + WARM_UP + 8, temperature=0.0, ignore_eos=True)
    for _ in range(batch):
        prompt = torch.randint(vocab_size, (options.prompt_len,), generator=generator).tolist()
        core.add(Request(prompt_ids=tuple(prompt), params=params))
    while core.has_work() and len(core.step()) < batch:
        pass
    for _ in range(WARM_UP):
        core.step()
    steps = [one_step(core, engine, head) for _ in range(options.steps)]
    while core.has_work():
        core.step()
    best = min(steps, key=lambda step: step["step"])
    median = {part: statistics.median(step[part] for step in steps) for part in best}
    outside = statistics.median(step["rest"] / (step["step"] - step["collectives"]) for step in steps)
    return {"batch": batch, "median_us": median, "best_us": best, "outside_kernels": outside}


def one_step(core: EngineCore, engine: CpuEngine, head: TimedLinear) -> dict[str, float]:
    """Microseconds by part; `rest` is Python, torch and the scheduler."""

    def clocks() -> dict[str, float]:
        kernels = {} if engine.program is None else engine.program.kernel_seconds()
        kernels["head"] = head.seconds
        return {**kernels, "collectives": sum(engine.comm.stats.seconds.values())}

    before, start = clocks(), time.perf_counter()
    core.step()
    seconds = time.perf_counter() - start
    parts = {name: (value - before[name]) * 1e6 for name, value in clocks().items()}
    return {"step": seconds * 1e6, **parts, "rest": seconds * 1e6 - sum(parts.values())}


def show(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(f"batch {result['batch']}: outside kernels {result['outside_kernels']:.1%} of a step without collectives")
        for which in ("median_us", "best_us"):
            parts = dict(result[which])
            step = parts.pop("step")
            shares = ", ".join(f"{name} {value:.0f} ({value / step:.0%})" for name, value in parts.items())
            print(f"batch {result['batch']}, {which.removesuffix('_us')} step {step:.0f} us: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--sync-interval", type=int, default=4)
    parser.add_argument("--quantization", choices=["none", "int8_wo", "int4_wo"], default="none")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine-dir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine_dir:
        run_rank(options.engine_dir, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        limits = BuildLimits(max_batch_size=max(options.batch), max_seq_len=options.prompt_len + options.steps + 64)
        shape = ShapeOptions(
            shape=SHAPES[options.shape],
            models=("pt",) if options.world_size > 1 else ("one",),
            world_size=options.world_size,
            sync_intervals=(options.sync_interval,),
            quantizations=(Quantization(method=options.quantization),),
        )
        engines = dict(make_engines(shape, limits, Path(folder)))
        for name, engine_dir in engines.items():
            command = [*launch_command(options.world_size), sys.executable, __file__, *sys.argv[1:]]
            command += ["--engine-dir", str(engine_dir)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            results = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{name}, load {os.getloadavg()[0]:.1f}")
            show(results)
            if options.json:
                options.json.with_stem(f"{options.json.stem}-{name}").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
