"""Choosing a package, checking a GPU, progress, and what a dead build process left."""

from __future__ import annotations

import pytest

from pt_trtllm.engine.tensorrt.gpu import Gpu
from pt_trtllm.engine.tensorrt.messages import Messages, Phases
from pt_trtllm.engine.tensorrt.pool import describe_end, num_workers
from pt_trtllm.engine.tensorrt.settings import TensorrtSettings, check_fp8, choose_library
from pt_trtllm.errors import EngineError

pytestmark = pytest.mark.unit

L40S = Gpu("sm89", 48 << 30)


def test_without_targets_the_gpu_that_is_present_is_meant() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs pip install '.[rtx]'")
    assert choose_library((), L40S)[1] == ("sm89",)
    assert choose_library(("sm80", "sm120", "sm80"), None)[1] == ("sm80", "sm120")
    with pytest.raises(EngineError, match="no GPU here to build for"):
        choose_library((), None)


def test_an_engine_is_refused_on_another_gpu() -> None:
    settings = TensorrtSettings(library="tensorrt_rtx", version="1.0", targets=("sm80", "sm89"))
    assert settings.check_gpu(L40S) == L40S
    with pytest.raises(EngineError, match="built for sm80, sm89, this machine's GPU is sm120; build again"):
        settings.check_gpu(Gpu("sm120", 32 << 30))
    with pytest.raises(EngineError, match="the driver shows none here"):
        settings.check_gpu(None)


def test_float8_weights_are_refused_where_a_gpu_has_no_float8() -> None:
    check_fp8(("sm89", "sm90", "sm120"))
    with pytest.raises(EngineError, match=r"fp8 \(e4m3\), which sm80, sm86 does not have: it begins with sm89; leave"):
        check_fp8(("sm89", "sm80", "sm86"))


def test_progress_is_the_share_of_steps_and_never_goes_back() -> None:
    phases, seen = Phases(), []
    phases.start("build", 2)
    phases.start("inner", 4)
    for step in range(4):
        phases.step("inner", step)
        seen.append(phases.fraction)
    phases.finish("inner")
    phases.step("build", 0)
    seen.append(phases.fraction)
    phases.start("another", 0)
    phases.finish("another")
    phases.step("build", 1)
    seen.append(phases.fraction)
    phases.finish("build")
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.5, 1.0]
    assert phases.fraction == 1.0


def test_the_first_errors_reach_the_user_in_one_line() -> None:
    warnings: list[str] = []
    messages = Messages(warnings.append)
    messages.take(False, "slow\nkernel")
    for number in range(5):
        messages.take(True, f"error {number}\n" + "x" * 1000)
    assert warnings == ["slow kernel"]
    assert messages.summary().startswith("error 0 xxx")
    assert "error 3" not in messages.summary()
    assert "\n" not in messages.summary()


def test_a_killed_build_is_blamed_on_memory_and_another_end_is_quoted() -> None:
    job = {"rank": 3, "weight_bytes": 8 << 30}
    assert "rank 3: its build was ended for lack of memory: it needs about 16.6 GiB" in describe_end(job, -9, "")
    assert describe_end(job, 1, "first\nTraceback: it broke") == (
        "rank 3: its build process ended with 1: first Traceback: it broke"
    )


def test_as_many_ranks_are_built_at_a_time_as_were_asked_for_or_fit() -> None:
    assert num_workers(3, 8, 1 << 20) == 3
    assert num_workers(0, 8, 1 << 60) == 1
    assert num_workers(0, 1, 1 << 20) == 1
