"""TensorRT engines on this machine's GPU against the CPU engine of the same checkpoint: logits and greedy tokens.

    python -m pt_trtllm.testing.gpu_engines RESULT.json [--model-dir examples/tiny-pt]

Writes what it found, or why nothing was run. Exit codes: 0 all good, 1 something was not, 77 nothing was run.
Called by scripts/gpu_check.sh.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.checkpoint.artifact import replace_file
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits, open_bundle
from pt_trtllm.engine.tensorrt.gpu import Gpu, present_gpu
from pt_trtllm.engine.tensorrt.settings import check_fp8, choose_library
from pt_trtllm.errors import EngineError, PtError
from pt_trtllm.runtime.generate import generate
from pt_trtllm.runtime.opening import open_engine
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.testing.numeric import relative_error

SKIPPED = 77
NUM_NEW_TOKENS = 24
LIMITS = BuildLimits(max_batch_size=4, max_seq_len=128, max_input_len=64, max_num_tokens=64)


@dataclass(frozen=True)
class Variant:
    dtype: str
    method: str
    bound: float
    """Of the largest difference of logits, relative to the largest logit. The CPU engine computes in float32, from
    weights that are quantised alike; it never rounds the inputs of a product to 8 bits. Each bound is three to eight
    times what the networks give on the CPU, evaluated with every result rounded to its declared type."""


VARIANTS = (
    Variant("float32", "none", 1e-3),
    Variant("float16", "none", 5e-3),
    Variant("bfloat16", "none", 3e-2),
    Variant("float16", "int8_wo", 1e-2),
    Variant("float16", "int4_wo", 4e-2),
    Variant("float16", "fp8_wo", 5e-3),
    Variant("float16", "fp8", 6e-2),
)


@dataclass(frozen=True)
class Answers:
    tokens: list[list[int]]
    """Per prompt, the greedy continuation: computed one token at a time, all prompts together."""
    logits: list[torch.Tensor]
    """Per text, float32 [tokens, vocabulary]: computed as a prompt."""


def why_not(gpu: Gpu | None) -> str | None:
    """What this machine lacks to run a TensorRT engine."""
    if gpu is None:
        return "the driver shows no GPU"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} is not made for CUDA, or finds no device"
    try:
        choose_library((), gpu)
    except PtError as error:
        return str(error)
    return None


def check(model_dir: Path, prompts: Sequence[Sequence[int]], variant: Variant, work: Path) -> dict[str, Any]:
    """Builds both engines of a variant under `work` and compares them. What breaks is part of the answer."""
    quantization = Quantization(method=variant.method, group_size=32)
    for name, dtype in (("cpu", "float32"), ("tensorrt", variant.dtype)):
        convert(model_dir, work / f"{name}-checkpoint", ConvertOptions(dtype=dtype, quantization=quantization))
        options = BuildOptions(
            backend=name, limits=LIMITS, backend_options=BackendOptions(gather_context_logits=name == "tensorrt")
        )
        build(work / f"{name}-checkpoint", work / name, options)
    return compare(work / "cpu", work / "tensorrt", prompts, variant.bound)


def variants(targets: Sequence[str]) -> list[Variant]:
    """Those that a GPU can run."""
    try:
        check_fp8(targets)
    except EngineError:
        return [variant for variant in VARIANTS if not Quantization(method=variant.method).is_fp8]
    return list(VARIANTS)


def compare(reference: Path, engine: Path, prompts: Sequence[Sequence[int]], bound: float) -> dict[str, Any]:
    """Two engine folders of one rank. Tokens may differ only where the reference's two logits are as near as the
    bound allows; what follows such a token is not compared."""
    expected = answers(reference, prompts)
    texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, expected.tokens, strict=True)]
    found = answers(engine, prompts, texts)
    pairs = list(zip(found.logits, expected.logits, strict=True))
    error = max(relative_error(mine, other) for mine, other in pairs)
    same, wrong = 0, []
    for index, (mine, other) in enumerate(zip(found.tokens, expected.tokens, strict=True)):
        length = next((at for at, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(other))
        same += length
        if length < len(other):
            row = expected.logits[index][len(prompts[index]) + length - 1]
            if row[other[length]] - row[mine[length]] > 2 * bound * row.abs().max():
                wrong.append({"prompt": index, "token": length, "found": mine[length], "expected": other[length]})
    return {
        "logits_error": float(f"{error:.3g}"),
        "bound": bound,
        "same_tokens": same,
        "tokens": sum(map(len, expected.tokens)),
        "wrong_tokens": wrong,
        "good": error <= bound and not wrong,  # NaN is not good either
    }


def answers(folder: Path, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]] | None = None) -> Answers:
    """Greedy continuations of `prompts`, and the logits of `texts`: without any, of the prompts so continued."""
    engine, options = open_engine(folder, open_bundle(folder)[0], LocalCommunicator(), RuntimeOptions())
    try:
        params = SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
        done, _ = generate(engine, [Request(prompt_ids=tuple(prompt), params=params) for prompt in prompts], options)
        tokens = [sequence.output_ids for sequence in done]
        if texts is None:
            texts = [[*prompt, *own] for prompt, own in zip(prompts, tokens, strict=True)]
        one = SamplingParams(max_tokens=1)
        read = [Request(prompt_ids=tuple(text), params=one, context_logits=True) for text in texts]
        done, _ = generate(engine, read, options)
        return Answers(tokens, [torch.stack(sequence.prompt_logits) for sequence in done])
    finally:
        engine.close()


def run(model_dir: Path, gpu: Gpu | None) -> dict[str, Any]:
    """Every variant on this GPU, or the reason for running none."""
    reason = why_not(gpu)
    if reason is not None or gpu is None:
        return {"skipped": reason, "lines": []}
    library, targets = choose_library((), gpu)
    prompts = [case["input_ids"] for case in json.loads((model_dir / "reference.json").read_text())["cases"]]
    lines = []
    for variant in variants(targets):
        line: dict[str, Any] = {"check": "engine", "dtype": variant.dtype, "quantization": variant.method}
        with tempfile.TemporaryDirectory() as work:
            try:
                line |= check(model_dir, prompts, variant, Path(work))
            except (PtError, RuntimeError) as error:
                line |= {"good": False, "error": " ".join(str(error).split())[:500]}
        print(f"gpu_engines: {line}", flush=True)
        lines.append(line)
    name = torch.cuda.get_device_name()
    return {"skipped": None, "library": f"{library.name} {library.version}", "device": name, "lines": lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model-dir", type=Path, default=Path("examples/tiny-pt"))
    options = parser.parse_args()
    result = run(options.model_dir, present_gpu())
    with replace_file(options.result) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    if result["skipped"]:
        print(f"gpu_engines: not run: {result['skipped']}")
        return SKIPPED
    return 0 if all(line["good"] for line in result["lines"]) else 1


if __name__ == "__main__":
    sys.exit(main())
