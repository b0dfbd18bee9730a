"""The shipped example: it answers as the reference does, in text, on 1, 2 and 4 ranks, and survives lower precision."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm import LLM
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.testing.jobs import Job, read_context_logits
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, mean_kl_divergence, relative_error
from pt_trtllm.testing.ranks import run_jobs

pytestmark = pytest.mark.mpi

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
REFERENCE: dict[str, Any] = json.loads((EXAMPLE / "reference.json").read_text())

# Largest mean KL divergence to float32, in nats per token; docs/benchmarks.md has what was measured.
PRECISIONS = {
    "bfloat16": (ConvertOptions(dtype="bfloat16"), 1e-3),
    "float16": (ConvertOptions(dtype="float16"), 1e-4),
    "int8": (ConvertOptions(dtype="float32", quantization=Quantization(method="int8_wo")), 1e-3),
    "int8_bfloat16": (ConvertOptions(dtype="bfloat16", quantization=Quantization(method="int8_wo")), 2e-3),
    "int4_group_32": (
        ConvertOptions(dtype="float32", quantization=Quantization(method="int4_wo", group_size=32)),
        3e-2,
    ),
}


def engine(folder: Path, options: ConvertOptions) -> Path:
    convert(EXAMPLE, folder / "checkpoint", options)
    build(folder / "checkpoint", folder / "engine", BuildOptions())
    return folder / "engine"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_it_continues_prompts_as_the_reference_does(
    example_engines: dict[int, Path], example_llm: LLM, world_size: int
) -> None:
    folder = example_engines[world_size]
    tokenizer = Tokenizer(folder / "tokenizer")
    cases = REFERENCE["cases"]
    assert [tokenizer.encode(case["prompt"]) for case in cases] == [case["input_ids"] for case in cases]
    params = [SamplingParams(max_tokens=len(case["output_ids"]), ignore_eos=True) for case in cases]
    with contextlib.nullcontext(example_llm) if world_size == 2 else LLM(folder) as llm:
        outputs = [result.outputs[0] for result in llm.generate([case["prompt"] for case in cases], params)]
    assert [list(output.token_ids) for output in outputs] == [case["output_ids"] for case in cases]
    assert [output.text for output in outputs] == [tokenizer.decode(case["output_ids"]) for case in cases]
    words = " ".join(output.text or "" for output in outputs).split()
    assert len(words) > 40
    assert {"the", "to"} <= set(words)


@pytest.fixture(scope="module")
def precisions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of every precision for the same texts, float32 first, all from one world of two ranks."""
    base = tmp_path_factory.mktemp("precisions")
    texts = [tuple(case["input_ids"] + case["output_ids"]) for case in REFERENCE["cases"]]
    variants = {"float32": ConvertOptions(dtype="float32")} | {
        name: options for name, (options, _) in PRECISIONS.items()
    }
    for name, options in variants.items():
        engine(base / name, ConvertOptions(**{**vars(options), "world_size": 2}))
        requests = [Request(prompt_ids=t, params=SamplingParams(max_tokens=1), context_logits=True) for t in texts]
        Job(requests=tuple(requests)).write(base / name)
    run_jobs(2, [(base / name / "engine", base / name) for name in variants])
    files = {name: read_context_logits(base / name / "context_logits.safetensors") for name in variants}
    return {name: torch.cat([logits[str(i)] for i in range(len(texts))]) for name, logits in files.items()}


@pytest.mark.parametrize("name", PRECISIONS)
def test_lower_precision_stays_near_float32(precisions: dict[str, torch.Tensor], name: str) -> None:
    divergence = mean_kl_divergence(precisions[name], precisions["float32"])
    assert 0 < divergence < PRECISIONS[name][1]
    assert relative_error(precisions[name], precisions["float32"]) > FLOAT32_LOGITS / 100
