"""Greedy tokens of every option in real vLLM, in float32, over 1, 2 and 4 ranks: those of the reference and of this
project's engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pt_trtllm.testing.vllm_cases import PT_CASES, TAMM_CASES, VllmCase, make_cases
from pt_trtllm.testing.vllm_engine import VllmAnswer, VllmEngines, VllmJob

RANKS = (1, 2, 4)
RUNS = [(name, ranks) for ranks in RANKS for name in (*TAMM_CASES, *PT_CASES)]
OPTION_RUNS: list[tuple[str, int, dict[str, Any]]] = [
    ("biases_half_rope_llama3", 1, {"batch_tracks": True}),
    ("linear_scaling_tied", 2, {"batch_tracks": True, "collective": "pt"}),
    ("dispatch_and_combine_norms", 2, {"collective": "pt"}),
    ("pre_scale_norms", 4, {"collective": "pt"}),
    ("two_tracks", 4, {"collective": "pt"}),
]
"""The plugin's own options: norms that come with a fusion (one, one per track, none), a mean over shared tracks."""
NUM_LAYERS = 4

WINDOW_TOO_SHORT = """
from pt_trtllm.vllm import layer
attention = layer.CachedAttention
def planted(*sizes, per_layer_sliding_window, **others):
    shorter = per_layer_sliding_window and per_layer_sliding_window - 1
    return attention(*sizes, per_layer_sliding_window=shorter, **others)
layer.CachedAttention = planted
"""
MEAN_WITHOUT_SCALE = """
from pt_trtllm.vllm import fusion
made = fusion.TrackFusion.__init__
def planted(self, mapping, op):
    made(self, mapping, "sum")
fusion.TrackFusion.__init__ = planted
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VllmCase]:
    return make_cases(tmp_path_factory.mktemp("cases"))


def job_of(case: VllmCase, ranks: int) -> VllmJob:
    return VllmJob(model=str(case.folder), prompts=case.prompts, ranks=ranks)


@pytest.fixture(scope="module")
def answers(engines: VllmEngines, cases: dict[str, VllmCase]) -> dict[tuple[str, int], VllmAnswer]:
    return dict(zip(RUNS, engines.run([job_of(cases[name], ranks) for name, ranks in RUNS]), strict=True))


@pytest.mark.parametrize(("name", "ranks"), RUNS)
def test_greedy_tokens_are_the_same(
    name: str, ranks: int, cases: dict[str, VllmCase], answers: dict[tuple[str, int], VllmAnswer]
) -> None:
    case, answer = cases[name], answers[name, ranks]
    assert not answer.error, answer.error
    assert answer.tokens == case.cpu
    assert case.tamm in (None, case.cpu)


@pytest.fixture(scope="module")
def answers_with_options(engines: VllmEngines, cases: dict[str, VllmCase]) -> list[VllmAnswer]:
    jobs = [
        dataclasses.replace(
            job_of(cases[name], ranks), counted=True, options={"additional_config": {"parallel_track": options}}
        )
        for name, ranks, options in OPTION_RUNS
    ]
    return engines.run(jobs)


@pytest.mark.parametrize("index", range(len(OPTION_RUNS)), ids=lambda index: f"{OPTION_RUNS[index]}")
def test_the_plugins_options_change_no_token(
    index: int, cases: dict[str, VllmCase], answers_with_options: list[VllmAnswer]
) -> None:
    (name, ranks, options), answer = OPTION_RUNS[index], answers_with_options[index]
    assert not answer.error, answer.error
    assert answer.tokens == cases[name].cpu
    if ranks > 1:  # vLLM's own collective is not made
        assert "tp:0 allreduce" not in answer.collectives
        assert answer.collectives["tp:0 all_gather"] == answer.passes
    if "batch_tracks" in options:  # one product for all tracks
        assert answer.products <= answer.passes * (4 * NUM_LAYERS + 1)


@pytest.mark.parametrize(
    ("name", "ranks", "error"),
    [("all_layers_with_a_window", 1, WINDOW_TOO_SHORT), ("two_tracks", 2, MEAN_WITHOUT_SCALE)],
    ids=["window_too_short", "mean_without_scale"],
)
def test_a_planted_error_shows(
    name: str, ranks: int, error: str, engines: VllmEngines, cases: dict[str, VllmCase]
) -> None:
    answer = engines.answer(dataclasses.replace(job_of(cases[name], ranks), before=error))
    assert answer.tokens != cases[name].cpu
