"""Build time, peak memory and size of the TensorRT engine of one rank, by default of a billion parameters.

    python scripts/bench_engines.py [--layers 18] [--dtype bfloat16] [--target sm80,sm89,sm120] [--json FILE]

Weights are random and distinct: TensorRT stores equal constants once. Memory is what the build's process took above
what it had when its network was ready: anonymous pages, since mapped pages of the checkpoint can be dropped.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import METHODS, Quantization
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits, engine_file, open_bundle
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint


def model(layers: int) -> ModelConfig:
    """One track of a billion parameters with 18 layers: 51 million in each, and the embedding."""
    return ModelConfig(
        vocab_size=32000, num_hidden_layers=layers, hidden_size=2048, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, intermediate_size=6656, tie_word_embeddings=True,
    )  # fmt: skip


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    write_big_checkpoint(work / "source", 0, model(arguments.layers), distinct=True)
    quantization = Quantization(method=arguments.quantization)
    convert(work / "source", work / "checkpoint", ConvertOptions(dtype=arguments.dtype, quantization=quantization))
    target = arguments.target or ("sm89,sm120" if quantization.is_fp8 else "sm80,sm89,sm120")
    options = BuildOptions(
        backend="tensorrt",
        limits=BuildLimits(max_batch_size=32, max_seq_len=4096, max_num_tokens=2048),
        backend_options=BackendOptions(targets=tuple(target.split(","))),
    )
    start = time.perf_counter()
    config = build(work / "checkpoint", work / "engine", options)
    seconds = time.perf_counter() - start
    [rank] = open_bundle(work / "engine")[1]["ranks"]
    taken = rank["peak_anonymous_bytes"] - rank["start_anonymous_bytes"]
    return {
        "library": f"{config.backend_config['library']} {config.backend_config['version']}",
        "targets": config.backend_config["targets"],
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "weight_gb": rank["weight_bytes"] / 1e9,
        "build_s": round(seconds, 1),
        "engine_gb": (work / "engine" / engine_file(0)).stat().st_size / 1e9,
        "peak_memory_gb": taken / 1e9,
        "peak_memory_per_weights": round(taken / rank["weight_bytes"], 2),
        "network_layers": rank["layers"],
        "machine": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18, help="18 make a billion parameters")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quantization", default="none", choices=METHODS)
    parser.add_argument("--target", help="[default: sm80,sm89,sm120, for fp8 weights sm89,sm120]")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        result = measure(Path(folder), arguments)
    for name, value in result.items():
        print(f"{name:<24} {value:.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
