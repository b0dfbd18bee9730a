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

MODELS = {tracks: ModelConfig(**SMALL, num_tracks=tracks) for tracks in (2, 4)}
WORLDS = [(4, 1), (4, 2), (4, 4), (2, 4)]
MODES = {"eager": True, "compiled": False}
RUNS = [(tracks, ranks, mode) for mode in MODES for tracks, ranks in WORLDS]
LLAMA_RUNS = [(2, mode) for mode in MODES]
PROMPTS = [[5, 9, 17, 3, 60, 2]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of tracks; 0 is a Llama with the layers of a track, as wide as four."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path_factory.mktemp("counted")
    for tracks, config in MODELS.items():
        write_random_pt(config, base / str(tracks))
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=384, num_hidden_layers=SMALL["num_hidden_layers"],
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(base / "0")
    return {tracks: base / str(tracks) for tracks in (0, *MODELS)}


@pytest.fixture(scope="module")
def counted(engines: VllmEngines, folders: dict[int, Path]) -> dict[tuple[Any, ...], VllmAnswer]:
    runs = [*RUNS, *((0, *run) for run in LLAMA_RUNS)]
    jobs = [
        VllmJob(
            model=str(folders[tracks]), prompts=PROMPTS, num_new_tokens=4, ranks=ranks, counted=True,
            options={"enforce_eager": MODES[mode], "max_num_batched_tokens": 64},
        )
        for tracks, ranks, mode in runs
    ]  # fmt: skip
    return dict(zip(runs, engines.run(jobs), strict=True))


def per_pass(answer: VllmAnswer) -> dict[str, float]:
    assert not answer.error, answer.error
    assert answer.passes == 4
    return {kind: count / answer.passes for kind, count in answer.collectives.items()}


@pytest.mark.parametrize(("tracks", "ranks", "mode"), RUNS)
def test_tracks_meet_as_planned(tracks: int, ranks: int, mode: str, counted: dict[tuple[Any, ...], VllmAnswer]) -> None:
    config = MODELS[tracks]
    plan = sync_counts(sync_plan(config, Mapping(world_size=ranks, num_tracks=tracks)))
    expected = collections.Counter(
        {
            "tp:0 allreduce": plan["track_fusion"],
            "tp:0 all_gather": plan["logits"],
            "tp:1 allreduce": plan["tensor_parallel"],
        }
    )
    assert per_pass(counted[tracks, ranks, mode]) == +expected
    if ranks > 1:
        assert plan["track_fusion"] == config.num_hidden_layers // config.interval


@pytest.mark.parametrize(("ranks", "mode"), LLAMA_RUNS)
def test_a_llama_meets_twice_a_layer(ranks: int, mode: str, counted: dict[tuple[Any, ...], VllmAnswer]) -> None:
    layers = SMALL["num_hidden_layers"]
    assert per_pass(counted[0, ranks, mode]) == {"tp:0 allreduce": 2 * layers + 1, "tp:0 all_gather": 1}


@pytest.mark.parametrize(("tracks", "ranks"), WORLDS)
def test_compiled_code_answers_alike(tracks: int, ranks: int, counted: dict[tuple[Any, ...], VllmAnswer]) -> None:
    assert counted[tracks, ranks, "compiled"].tokens == counted[tracks, ranks, "eager"].tokens
