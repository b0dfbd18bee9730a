"""Greedy tokens of every option in real vLLM, in float32, over 1, 2 and 4 ranks: those of the reference and of this
project's engine."""

from __future__ import annotations

import dataclasses

import pytest

from pt_trtllm.testing.vllm_cases import PT_CASES, TAMM_CASES, VllmCase, make_cases
from pt_trtllm.testing.vllm_engine import VllmAnswer, VllmEngines, VllmJob

RANKS = (1, 2, 4)
RUNS = [(name, ranks) for ranks in RANKS for name in (*TAMM_CASES, *PT_CASES)]

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
