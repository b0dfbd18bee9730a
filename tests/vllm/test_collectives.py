"""How often ranks meet in real vLLM: L/D times per forward pass and once for the logits, as `sync_plan` says; a Llama
of equal size meets 2L + 1 times. Counted at the kernels of shared memory, so compiled code counts as well."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping, sync_counts, sync_plan
from pt_trtllm.testing.vllm_cases import SMALL, write_random_pt
from pt_trtllm.testing.vllm_engine import VllmAnswer, VllmEngines, VllmJob

WORLDS = [(4, 1), (4, 2), (4, 4), (2, 4)]
"""(tracks, ranks)"""
INTERVAL = 2
MODES = [("eager", 4), ("eager", 2), ("compiled", 2)]
"""(mode, layers of a track): compiling takes a core ten seconds a layer and rank."""
LLAMA = 0
RUNS = [(tracks, ranks, *mode) for mode in MODES for tracks, ranks in WORLDS]
LLAMA_RUNS = [(LLAMA, 2, *mode) for mode in MODES]
PROMPTS = [[5, 9, 17, 3, 60, 2]]


def model_of(tracks: int, layers: int) -> ModelConfig:
    return ModelConfig(**{**SMALL, "num_tracks": tracks, "num_hidden_layers": layers, "sync_interval": INTERVAL})


@pytest.fixture(scope="module")
def counted(engines: VllmEngines, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], VllmAnswer]:
    base = tmp_path_factory.mktemp("counted")
    for layers in {layers for _, layers in MODES}:
        save_llama(layers, base / f"{LLAMA}-{layers}")
        for tracks in {tracks for tracks, _ in WORLDS}:
            write_random_pt(model_of(tracks, layers), base / f"{tracks}-{layers}")
    runs = [*RUNS, *LLAMA_RUNS]
    jobs = [
        VllmJob(
            model=str(base / f"{tracks}-{layers}"), prompts=PROMPTS, num_new_tokens=4, ranks=ranks, counted=True,
            options={"enforce_eager": mode == "eager", "max_num_batched_tokens": 64},
        )
        for tracks, ranks, mode, layers in runs
    ]  # fmt: skip
    return dict(zip(runs, engines.run(jobs), strict=True))


def save_llama(layers: int, folder: Path) -> None:
    """As wide as four tracks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def per_pass(answer: VllmAnswer) -> dict[str, float]:
    assert not answer.error, answer.error
    assert answer.passes == 4
    return {kind: count / answer.passes for kind, count in answer.collectives.items()}


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_tracks_meet_as_planned(run: tuple[int, int, str, int], counted: dict[tuple[Any, ...], VllmAnswer]) -> None:
    tracks, ranks, _, layers = run
    plan = sync_counts(sync_plan(model_of(tracks, layers), Mapping(world_size=ranks, num_tracks=tracks)))
    expected = collections.Counter(
        {
            "tp:0 allreduce": plan["track_fusion"],
            "tp:0 all_gather": plan["logits"],
            "tp:1 allreduce": plan["tensor_parallel"],
        }
    )
    assert per_pass(counted[run]) == +expected
    assert plan["track_fusion"] == (layers // INTERVAL if ranks > 1 else 0)


@pytest.mark.parametrize("run", LLAMA_RUNS, ids=str)
def test_a_llama_meets_twice_a_layer(
    run: tuple[int, int, str, int], counted: dict[tuple[Any, ...], VllmAnswer]
) -> None:
    assert per_pass(counted[run]) == {"tp:0 allreduce": 2 * run[-1] + 1, "tp:0 all_gather": 1}


@pytest.mark.parametrize(("tracks", "ranks"), WORLDS)
def test_compiled_code_answers_alike(tracks: int, ranks: int, counted: dict[tuple[Any, ...], VllmAnswer]) -> None:
    assert counted[tracks, ranks, "compiled", 2].tokens == counted[tracks, ranks, "eager", 2].tokens
