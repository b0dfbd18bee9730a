"""Llama-style models from a Hugging Face folder to an answer, over one and two ranks, against transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pt_trtllm.cli.main import cli
from pt_trtllm.testing.cli import check_cli
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close, relative_error

pytestmark = pytest.mark.mpi

NUM_LAYERS, MAX_NEW_TOKENS = 2, 8
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


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    case = CASES[request.param]
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(97, (length,), generator=generator).tolist() for length in (37, 1, 22)]
    model, folder = make_model(case, {}), tmp_path_factory.mktemp(request.param)
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


def cli_in_process(*args: str | Path | int) -> None:
    """Spares a start of Python and torch; `run` gets processes of its own."""
    cli.main([str(arg) for arg in args], standalone_mode=False)


@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_and_greedy_continuations_equal_those_of_transformers(
    reference: Reference, world_size: int, tmp_path: Path
) -> None:
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    cli_in_process(
        "convert", "--model-dir", reference.folder, "--output-dir", checkpoint, "--source", "llama",
        "--world-size", world_size, "--dtype", "float32",
    )  # fmt: skip
    cli_in_process("build", "--checkpoint-dir", checkpoint, "--output-dir", engine, "--max-seq-len", 64)
    logits_path, output_path = tmp_path / "logits.safetensors", tmp_path / "output.json"
    check_cli(
        "run", "--engine-dir", engine, "--input-ids", json.dumps(reference.prompts),
        "--max-new-tokens", MAX_NEW_TOKENS, "--context-logits", logits_path, "--output-json", output_path,
    )  # fmt: skip

    logits, output = load_file(logits_path), json.loads(output_path.read_text())
    assert len(logits) == len(reference.prompts)
    for index, expected in enumerate(reference.logits):
        assert_close(logits[str(index)], expected, FLOAT32_LOGITS, f"logits of prompt {index}")
    assert [answer["output_ids"] for answer in output["outputs"]] == reference.continuations
    split = world_size > 1
    assert output["stats"]["world_size"] == world_size
    assert output["stats"]["sync_points_per_forward"] == {
        "track_fusion": 0,
        "tensor_parallel": 2 * NUM_LAYERS * split,
        "logits": int(split),
    }


def test_the_feature_of_a_case_changes_the_logits(reference: Reference) -> None:
    assert relative_error(reference.logits_without[0], reference.logits[0]) > 100 * FLOAT32_LOGITS
