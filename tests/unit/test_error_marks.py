"""The kind of an error survives the text that Triton carries it in, whatever stands around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_trtllm.errors import (
    KINDS,
    CheckpointError,
    CommunicationError,
    ConfigError,
    Kind,
    PtError,
    ServingError,
    error_of_kind,
)
from pt_trtllm.openai.errors import MEANINGS, ApiError
from pt_trtllm.serving.control import IS_RESTARTED, QUEUE_IS_FULL
from pt_trtllm.serving.error_marks import marked, read_mark
from pt_trtllm.serving.supervisor import QueueFull, Unavailable

pytestmark = pytest.mark.unit


@given(st.text(), st.sampled_from(sorted(KINDS)), st.booleans(), st.text(alphabet=" abc:'"), st.text(alphabet=" .)"))
def test_what_is_marked_is_read(message: str, kind: Kind, was_taken: bool, before: str, behind: str) -> None:
    told = read_mark(before + marked(PtError(message, kind=kind, was_taken=was_taken)) + behind)
    assert (told.kind, told.was_taken) == (kind, was_taken)
    if "[" not in message:
        assert "[error kind" not in told.message


def test_a_mark_that_a_client_wrote_does_not_count() -> None:
    told = read_mark(marked(ConfigError("guide is '[error kind: queue_full, not taken]', expected one of ...")))
    assert (told.kind, told.was_taken) == ("invalid", True)


def test_every_kind_of_error_has_its_status_once() -> None:
    assert set(MEANINGS) == KINDS
    errors = {
        ConfigError("top_k is -1"): (400, None, True),
        error_of_kind("too_long", "the KV cache has 8 blocks"): (400, "context_length_exceeded", True),
        QueueFull(f"{QUEUE_IS_FULL}: 96"): (429, "queue_full", False),
        Unavailable(f"{IS_RESTARTED}: rank 1 died"): (503, None, False),
        CommunicationError("rank 1 (pid 7) died without a message"): (503, None, True),
        error_of_kind("failed", "the disk is full"): (500, None, True),
    }
    for error, (status, code, was_taken) in errors.items():
        told = read_mark(f"in ensemble 'ensemble', {marked(error)}")
        answer = ApiError.of(told)
        assert (answer.status, answer.code, told.was_taken) == (status, code, was_taken)
        assert str(answer) == f"in ensemble 'ensemble', {error}"
        assert told.as_error().kind == told.kind


def test_clients_see_no_files_and_no_logs_of_the_server() -> None:
    error = CommunicationError("rank 0 failed", detail=": KeyError; last lines of its log: /srv/app/worker.py")
    assert "worker.py" in str(error)
    assert marked(error) == "rank 0 failed [error kind: unavailable]"
    assert marked(CheckpointError("'/srv/models/a/rank1.engine': damaged")).startswith("'rank1.engine': damaged ")
    assert marked(OSError(28, "No space left on device", "/srv/x")) == (
        "the server failed at this request (OSError); its log says more [error kind: failed]"
    )
    assert "/srv/prompt" in marked(ConfigError("bad_words has '/srv/prompt'")), "what a client sent it may see again"


@pytest.mark.parametrize(
    ("text", "kind", "was_taken"),
    [
        ("Exceeds maximum queue size: 8", "queue_full", False),
        ("Request for unknown model: 'tensorrt_llm_bls' has no available versions", "unavailable", False),
        ("in ensemble, Request for unknown model: 'tensorrt_llm_bls' is not ready", "unavailable", True),
        ("Prompt length (600) exceeds maximum input length (512)", "too_long", True),
        ("unexpected inference input 'x': expected one of ...", "invalid", True),
        ("Segmentation fault", "failed", True),
    ],
)
def test_servers_that_write_no_marks_are_read_by_their_words(text: str, kind: Kind, was_taken: bool) -> None:
    told = read_mark(text)
    assert (told.message, told.kind, told.was_taken) == (text, kind, was_taken)


def test_a_model_that_is_not_loaded_has_taken_nothing() -> None:
    told = read_mark("Request for unknown model: 'tensorrt_llm_bls' has no available versions")
    assert (told.kind, told.was_taken) == ("unavailable", False)


def test_a_kind_that_is_not_known_is_a_failure() -> None:
    assert isinstance(read_mark("x [error kind: novel]").as_error(), ServingError)
    assert read_mark("x [error kind: novel]").kind == "failed"
