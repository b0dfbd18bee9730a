"""The oracle: checkpoints made by the reference implementation (`tamm`), and what it computes from them."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NUM_NEW_TOKENS = 8
PROMPT_LENGTHS = (5, 11, 1)


@dataclass(frozen=True)
class Reference:
    """A checkpoint folder, prompts, and the reference's answers."""

    folder: Path
    prompts: list[list[int]]
    logits: list[torch.Tensor]
    """Per prompt, float32 [tokens, vocabulary]."""
    continuations: list[list[int]]
    """Per prompt, the greedy next tokens."""


def build_model(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A reference model with weights large enough that every part of it shows in the logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tamm.models.afm_text.afm_pt_moe import AFMParallelTrackMoEConfig

        model: torch.nn.Module = AFMParallelTrackMoEConfig(**config).create_model().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.15, generator=generator)
    return model


def save_checkpoint(model: torch.nn.Module, config: dict[str, Any], folder: Path) -> None:
    """The reference's format: its config's fields and its state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().clone() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def make_reference(
    config: dict[str, Any], folder: Path, seed: int = 0, prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
) -> Reference:
    """Saves a random model and answers random prompts with it, recomputing everything for every token."""
    model = build_model(config, seed)
    save_checkpoint(model, config, folder)
    generator = torch.Generator().manual_seed(seed + 1)
    prompts = [
        torch.randint(config["vocab_size"], (length,), generator=generator).tolist() for length in prompt_lengths
    ]
    return Reference(
        folder=folder,
        prompts=prompts,
        logits=[logits_of(model, prompt) for prompt in prompts],
        continuations=[greedy(model, prompt, NUM_NEW_TOKENS) for prompt in prompts],
    )


@torch.no_grad()
def logits_of(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.float()


def greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
