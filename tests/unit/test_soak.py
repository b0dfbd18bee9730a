"""What a soak may not find is told by name; the plans of its clients are what they are said to be."""

from __future__ import annotations

import signal
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from pt_trtllm.testing.soak.faults import RANK, Fault
from pt_trtllm.testing.soak.report import against_log, by_kind, judge
from pt_trtllm.testing.soak.requests import PATHS, Ending, draw_plans

pytestmark = pytest.mark.unit

NUM_PLANS = 2000
LOG = r'I1130 model.py:1] "{\"event\": \"answer\", \"request_id\": \"%s\", \"prompt_tokens\": 3}"'


def sound_report() -> dict[str, Any]:
    return {
        "requests": 2,
        "endings": Counter(answered=1, left=1),
        "wrong": [],
        "log": {"requests with two lines": [], "answered without a line": []},
        "faults": by_kind([Fault(target=RANK, number=signal.SIGKILL, outage_s=1.0)]),
        "quiet with no KV block in use": [True, True],
        "descriptors, first and last": {"serve (1)": [8, 8]},
        "dead processes that nobody took in": [],
        "processes left": [],
        "left in shared memory": [],
        "left in the folder of temporary files": [],
    }


def test_a_sound_run_has_no_problems() -> None:
    assert judge(sound_report()) == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"wrong": ["soak-1: 2 ends"]}, "did not end exactly once"),
        ({"log": {"requests with two lines": ["soak-1"], "answered without a line": []}}, "did not end exactly once"),
        ({"log": {"requests with two lines": [], "answered without a line": ["soak-1"]}}, "no line in the log"),
        ({"endings": Counter(answered=1)}, "fewer requests ended"),
        ({"quiet with no KV block in use": [True, False]}, "blocks of the KV cache"),
        ({"descriptors, first and last": {"serve (1)": [8, 80]}}, "serve (1): 8, then 80"),
        ({"dead processes that nobody took in": ["child of serve"]}, "dead processes"),
        ({"processes left": [7]}, "processes are left: [7]"),
        ({"left in shared memory": ["/dev/shm/x"]}, "/dev/shm/x"),
        ({"left in the folder of temporary files": ["pt-triton-x"]}, "pt-triton-x"),
        ({"faults": by_kind([Fault(target=RANK, number=signal.SIGSTOP, outage_s=None)])}, "rank, SIGSTOP"),
    ],
)
def test_whatever_may_not_be_is_told(found: dict[str, Any], problem: str) -> None:
    (told,) = judge(sound_report() | found)
    assert problem in told


def test_answers_are_compared_with_the_servers_log() -> None:
    plan = next(plan for plan in draw_plans(0.0, seed=1) if plan.path == "ensemble")
    endings = [
        Ending(plan=plan, request_id=f"soak-{name}", how="answered", began=0.0, ended=1.0) for name in ("a", "b")
    ]
    log = "\n".join(LOG % name for name in ("soak-a", "soak-c", "soak-c", "another", "another"))
    found = against_log(endings, log)
    assert found == {"lines": 5, "requests with two lines": ["soak-c"], "answered without a line": ["soak-b"]}


def test_plans_are_mixed_and_the_same_for_a_seed() -> None:
    plans = list(islice(draw_plans(0.2, seed=3), NUM_PLANS))
    assert plans == list(islice(draw_plans(0.2, seed=3), NUM_PLANS))
    assert {plan.path for plan in plans} == {path for path, _ in PATHS}
    left = sum(plan.leaves_after is not None for plan in plans) / NUM_PLANS
    assert left == pytest.approx(0.2, abs=0.05)
