"""Llama-style models from a Hugging Face folder to an answer, over one and two ranks, against transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.testing.jobs import Job, read_context_logits
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close, relative_error
from pt_trtllm.testing.ranks import run_jobs

pytestmark = pytest.mark.mpi

NUM_LAYERS, MAX_NEW_TOKENS = 2, 8
WORLD_SIZES = (1, 2)
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    changes: dict[str, Any]
    without: dict[str, Any]
    """Switches the case's feature off without changing the weights: the answer must then be another one."""


CASES = {
    "llama": Case(
        family="llama",
        changes={
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
        without={"rope_parameters": DEFAULT_ROPE},
    ),
    "llama-yarn": Case(
        family="llama",
        changes={
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
        without={"rope_parameters": DEFAULT_ROPE},
    ),
    "mistral": Case(
        family="mistral",
        changes={"sliding_window": 4, "num_key_value_heads": 1, "head_dim": 24},  # one head, shared by two ranks
        without={"sliding_window": None},
    ),
    "qwen2": Case(
        family="qwen2",
        changes={
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
        without={"rope_parameters": DEFAULT_ROPE},
    ),
    "qwen3": Case(
        family="qwen3",
        changes={"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        without={"use_sliding_window": False},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What transformers computes, and the folder it saved."""

    folder: Path
    prompts: list[list[int]]
    logits: list[torch.Tensor]
    """Per prompt: [tokens, vocabulary] float32."""
    logits_without: list[torch.Tensor]
    continuations: list[list[int]]


def make_model(case: Case, changes: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[case.family](**{**TINY, **case.changes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    # A fresh model hardly attends (weights of 0.02), and its norms and biases are ones and zeros: nothing would show.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise if parameter.dim() == 1 else noise / 5)
    return model


@torch.no_grad()
def logits_of(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


def make_reference(case: Case, folder: Path) -> Reference:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(97, (length,), generator=generator).tolist() for length in (37, 1, 22)]
    model = make_model(case, {})
    model.save_pretrained(folder)
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
        )
        continuations.append(answer[0, len(prompt) :].tolist())
    return Reference(
        folder=folder,
        prompts=prompts,
        logits=logits_of(model, prompts),
        logits_without=logits_of(make_model(case, case.without), prompts),
        continuations=continuations,
    )


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("references")
    return {name: make_reference(case, folder / name) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def jobs(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The folders of the answers. All cases of one world size run in one world."""
    base = tmp_path_factory.mktemp("jobs")
    folders = {(name, size): base / f"{name}-{size}" for size in WORLD_SIZES for name in CASES}
    params, limits = SamplingParams(max_tokens=MAX_NEW_TOKENS), BuildLimits(max_seq_len=64)
    for (name, size), folder in folders.items():
        source, prompts = references[name].folder, references[name].prompts
        convert(source, folder / "checkpoint", ConvertOptions(source="llama", world_size=size, dtype="float32"))
        build(folder / "checkpoint", folder / "engine", BuildOptions(limits=limits))
        requests = [Request(prompt_ids=tuple(ids), params=params, context_logits=True) for ids in prompts]
        Job(requests=tuple(requests)).write(folder)
    for world_size in WORLD_SIZES:
        own = [folder for (_, size), folder in folders.items() if size == world_size]
        run_jobs(world_size, [(folder / "engine", folder) for folder in own])
    return folders


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_continuations_equal_those_of_transformers(
    references: dict[str, Reference], jobs: dict[tuple[str, int], Path], name: str, world_size: int
) -> None:
    reference, folder = references[name], jobs[name, world_size]
    logits, results = read_context_logits(folder / "context_logits.safetensors"), Job.read_results(folder)
    assert len(logits) == len(reference.prompts)
    for index, expected in enumerate(reference.logits):
        assert_close(logits[str(index)], expected, FLOAT32_LOGITS, f"logits of prompt {index}")
    assert [output["output_ids"] for output in results["outputs"]] == reference.continuations
    split = world_size > 1
    assert results["stats"]["world_size"] == world_size
    assert results["stats"]["sync_points_per_forward"] == {
        "track_fusion": 0,
        "tensor_parallel": 2 * NUM_LAYERS * split,
        "logits": int(split),
    }


@pytest.mark.parametrize("name", CASES)
def test_the_feature_of_a_case_changes_the_logits(references: dict[str, Reference], name: str) -> None:
    reference = references[name]
    assert relative_error(reference.logits_without[0], reference.logits[0]) > 100 * FLOAT32_LOGITS
