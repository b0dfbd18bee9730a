"""What encoded fusions cost in accuracy: error of the fused state, divergence and perplexity, over real MPI ranks.

    python scripts/bench_codecs.py [--model-dir examples/tiny-pt] [--rows N] [--text FILE] [--json FILE]

Text: the chapters that were held out when the example model was trained (fetched like the training script does), or a
file of yours. Models: the example and two with outlier channels (codec_models.py says how). Not a measurement of speed,
but for a rough time of encoding and decoding on one core.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import codec_models as models
import tiny_pt_files as files
import torch
from torch.nn import functional

from pt_trtllm.bench.machine import hardware, versions
from pt_trtllm.comm.base import Communicator
from pt_trtllm.comm.coding import ALGORITHMS, CODECS, NO_CODING, Coding, decode, encode, encoded_bytes
from pt_trtllm.runtime.launch import launch_command
from pt_trtllm.runtime.opening import connect
from pt_trtllm.runtime.tokenizer import load_backend
from pt_trtllm.testing.numeric import mean_kl_divergence

ROOT = Path(__file__).parent.parent
ROW_TOKENS = 256
CODINGS = (
    NO_CODING,
    *(
        Coding(codec=codec, delta=delta, algorithm=algorithm)
        for codec in CODECS[1:]
        for delta in (False, True)
        for algorithm in ALGORITHMS[1:]
    ),
)


class MeasuredFusion(models.ObservedFusion):
    """Fuses the same values without a codec as well, and keeps how far the encoded result is from that."""

    def __init__(self, comm: Communicator, exact: Communicator, scale: torch.Tensor | None, segments: int) -> None:
        super().__init__(comm, scale)
        self._exact, self._back = exact, torch.ones(()) if scale is None else 1 / scale
        self._squares = torch.zeros(segments, 2, dtype=torch.float64)
        self._calls = 0

    def _fuse(self, hidden: torch.Tensor, op: str, base: torch.Tensor | None) -> torch.Tensor:
        found, wanted = super()._fuse(hidden, op, base), self._exact.track_fusion(hidden, op)
        error, size = ((found - wanted) * self._back).double(), (wanted * self._back).double()
        self._squares[self._calls % len(self._squares)] += torch.stack([error.square().sum(), size.square().sum()])
        self._calls += 1
        return found

    def relative_errors(self) -> list[float]:
        """Root mean square over root mean square, per fusion of a pass; outlier channels back at their own size."""
        return (self._squares[:, 0] / self._squares[:, 1]).sqrt().tolist()


def worker(job: Path) -> None:
    """One MPI rank: every model under every coding, over the same rows."""
    torch.set_num_threads(1)
    plan = json.loads((job / "job.json").read_text())
    rows = [torch.tensor(row) for row in plan["rows"]]
    results = []
    for model in plan["models"]:
        reference: list[torch.Tensor] = []
        for coding in CODINGS:
            config, _ = models.open_bundle(Path(model["engine"]))
            spec = config.checkpoint.model
            scale = models.outlier_scale(spec.hidden_size) if model["outliers"] else None
            coded, exact = connect(config.mapping, coding), connect(config.mapping)
            comm = MeasuredFusion(coded, exact, scale, spec.num_hidden_layers // spec.interval)
            engine = models.open_rank(Path(model["engine"]), comm)
            loss = divergence = 0.0
            for index, row in enumerate(rows):
                comm.fused.clear()
                answer = engine.forward(models.whole_row(row[:-1]))
                if answer is None:
                    continue
                logits = torch.stack([values for values in answer.rows if isinstance(values, torch.Tensor)])
                loss += functional.cross_entropy(logits, row[1:], reduction="sum").item()
                if coding == NO_CODING:
                    reference.append(logits)
                else:
                    divergence += mean_kl_divergence(logits, reference[index]) * len(logits)
            tokens = sum(len(row) - 1 for row in rows)
            results.append(
                {
                    "model": model["name"], **asdict(coding), "bits_per_value": bits(coding, spec.hidden_size),
                    "error_per_fusion": comm.relative_errors(), "kl_nats_per_token": divergence / tokens,
                    "perplexity": math.exp(loss / tokens),
                }
            )  # fmt: skip
            for link in (coded, exact):
                link.barrier()
                link.close()
    if comm.rank == 0:
        (job / "results.json").write_text(json.dumps(results))


def bits(coding: Coding, hidden: int) -> float:
    return 32.0 if coding.codec == "none" else encoded_bytes(coding.codec, 1024, hidden) * 8 / (1024 * hidden)


def outlier_ratio(model_dir: Path, rows: list[torch.Tensor], folder: Path, scale: torch.Tensor | None) -> list[float]:
    """Per fusion: root mean square of the largest channel over that of the median one, as it travels."""
    comm = models.ObservedFusion(models.LocalCommunicator())
    engine = models.open_rank(models.make_engine(model_dir, folder, 1), comm)
    for row in rows:
        engine.forward(models.whole_row(row))
    segments = engine.config.checkpoint.model.num_hidden_layers // engine.config.checkpoint.model.interval
    ratios = []
    for segment in range(segments):
        sizes = torch.cat(comm.fused[segment::segments]).square().mean(0).sqrt() * (1.0 if scale is None else scale)
        ratios.append(float(sizes.max() / sizes.median()))
    return ratios


def held_out_rows(args: argparse.Namespace, folder: Path) -> tuple[list[list[int]], dict[str, Any]]:
    """Rows of `bos` and up to 256 tokens, and where the text is from."""
    documents, record = files.read_text_file(args.text) if args.text else files.fetch_source("austen", folder)
    held = documents if args.text else files.split_validation(documents)[1]
    tokenizer = load_backend(args.model_dir / "tokenizer.json")
    pieces = torch.tensor(files.encode(tokenizer, held)).split(ROW_TOKENS)[: args.rows]
    return [[files.BOS_ID, *piece.tolist()] for piece in pieces], record


def codec_times() -> dict[str, dict[str, float]]:
    """Nanoseconds per value on one core, bfloat16 [64, 4096]: the best of several, rough."""
    torch.set_num_threads(1)
    x, times = torch.randn(64, 4096).to(torch.bfloat16), {}
    for codec in CODECS[1:]:
        message = encode(codec, x)
        calls = {"encode": lambda c=codec: encode(c, x), "decode": lambda c=codec, m=message: decode(c, m, *x.shape)}
        times[codec] = {}
        for name, call in calls.items():
            samples = []
            for _ in range(30):
                start = time.perf_counter()
                call()
                samples.append(time.perf_counter() - start)
            times[codec][name] = min(samples) / x.numel() * 1e9
    return times


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows, source = held_out_rows(args, folder)
    some = [torch.tensor(row[:-1]) for row in rows[:8]]
    turned = models.turn_to_principal_axes(args.model_dir, some, folder)
    scale = models.outlier_scale(json.loads((args.model_dir / "config.json").read_text())["hidden_size"])
    plan = []
    for name, model_dir, outliers in (
        ("example", args.model_dir, False),
        ("principal axes", turned, False),
        ("channels x 64", args.model_dir, True),
    ):
        place = folder / name.replace(" ", "-")
        ratios = outlier_ratio(model_dir, some, place / "alone", scale if outliers else None)
        engine = models.make_engine(model_dir, place / "ranks", args.world_size)
        plan.append({"name": name, "engine": str(engine), "outliers": outliers, "largest_over_median_channel": ratios})
    (folder / "job.json").write_text(json.dumps({"rows": rows, "models": plan}))
    command = [*launch_command(args.world_size), sys.executable, str(Path(__file__).resolve()), "--worker", str(folder)]
    subprocess.run(command, check=True, timeout=3600)
    return {
        "hardware": hardware() | {"world_size": args.world_size},
        "versions": versions(),
        "text": source | {"tokens": sum(len(row) - 1 for row in rows)},
        "models": [{key: model[key] for key in ("name", "largest_over_median_channel")} for model in plan],
        "results": json.loads((folder / "results.json").read_text()),
        "ns_per_value": codec_times(),
    }


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['hardware']}, {report['versions']}, {report['text']['tokens']} tokens")
    for model in report["models"]:
        ratios = ", ".join(f"{ratio:.1f}" for ratio in model["largest_over_median_channel"])
        print(f"\n{model['name']}: largest channel over median channel, per fusion: {ratios}")
        print("| codec | bits | sends | rounds | error of fusion 1, 2, ... | KL, nats per token | perplexity |")
        print("|---|---:|---|---|---|---:|---:|")
        own = [row for row in report["results"] if row["model"] == model["name"]]
        exact = own[0]["perplexity"]
        for row in own:
            errors = ", ".join(f"{error:.2%}" for error in row["error_per_fusion"])
            rounds = {"auto": "never", "one_shot": "once", "two_shot": "twice"}[row["algorithm"]]
            change = "" if row is own[0] else f" ({row['perplexity'] / exact - 1:+.2%})"
            print(
                f"| {row['codec']} | {row['bits_per_value']:g} | {'change' if row['delta'] else 'state'} | {rounds} "
                f"| {errors} | {row['kl_nats_per_token']:.2g} | {row['perplexity']:.3f}{change} |"
            )
    print("\n| codec | encode, ns per value | decode |\n|---|---:|---:|")
    for codec, times in report["ns_per_value"].items():
        print(f"| {codec} | {times['encode']:.2f} | {times['decode']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=ROOT / "examples/tiny-pt")
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--rows", type=int, help="use only the first rows of 256 tokens")
    parser.add_argument("--text", type=Path, help="UTF-8 text to use instead of the held-out chapters")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    with tempfile.TemporaryDirectory(prefix="pt-bench-") as folder:
        report = measure(args, Path(folder))
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
