"""Rank 0's loop: takes requests from a channel between steps, sends tokens after each."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from pt_trtllm.config import shown
from pt_trtllm.errors import PtError
from pt_trtllm.runtime.core import EngineCore
from pt_trtllm.runtime.protocol import (
    GONE,
    PROGRESS_PERIOD_S,
    Channel,
    Inbox,
    Message,
    logits_file,
    request_from_json,
    write_logits,
)
from pt_trtllm.runtime.rank_log import log_traceback
from pt_trtllm.runtime.request import Sequence
from pt_trtllm.runtime.values import is_whole


class Service:
    """Serves one client until it says shutdown or goes away."""

    def __init__(self, core: EngineCore, channel: Channel, folder: Path) -> None:
        self._core, self._channel, self._folder = core, channel, folder
        self._last_sent, self._num_steps_told = 0.0, 0
        self._running: dict[int, Sequence] = {}
        self._ids: dict[Sequence, int] = {}
        self._unreported: list[list[Any]] = []

    def run(self) -> None:
        self._inbox = Inbox(self._channel)
        self._channel.send({"type": "ready"})
        while self._take_messages():
            if self._core.has_work():
                self._note(self._core.step(meanwhile=self._report))
            self._tell_progress()
            if not self._core.has_work():
                self._report()
                self._core.trace.lap("report")

    def _take_messages(self) -> bool:
        """Handles what has arrived; sleeps while there is nothing to do at all. False: shut down."""
        while not self._inbox.empty() or not self._core.has_work():
            message = self._inbox.get()
            self._core.trace.begin()
            if message == GONE:
                return False
            try:
                self._handle(message)
            except (KeyError, TypeError, ValueError) as error:  # it is malformed: the others are not
                log_traceback(error)
            self._core.trace.lap("messages")
        return True

    def _handle(self, message: Message) -> None:
        if message["type"] == "submit":
            for request_id, request in message["requests"]:
                self._submit(request_id, request)
        elif message["type"] == "cancel":
            self._cancel(message["id"])
        elif message["type"] == "stats":
            self._channel.send({"type": "stats", "stats": self._core.stats().to_json()})

    def _submit(self, request_id: int, request: Message) -> None:
        if not is_whole(request_id) or request_id in self._running:
            raise ValueError(f"a request is called {shown(request_id)}, expected a number of its own")
        try:
            sequence = self._core.add(request_from_json(request))
        except PtError as error:
            self._refuse(request_id, error)
            return
        except Exception as error:
            log_traceback(error)
            what = f"the engine could not begin this request ({type(error).__name__}); its log has more"
            self._refuse(request_id, PtError(what, kind="failed"))
            return
        self._running[request_id] = sequence
        self._ids[sequence] = request_id

    def _cancel(self, request_id: int) -> None:
        sequence = self._running.get(request_id)
        if sequence is None:
            return  # it ended before the message came
        self._report()
        self._core.cancel(sequence)
        self._release(sequence)
        self._channel.send({"type": "tokens", "outputs": [[request_id, [], "cancelled", {}]]})

    def _note(self, advanced: list[Sequence]) -> None:
        """Keeps what a step gave for the next report, so that the other ranks need not wait for it."""
        for sequence in advanced:
            request_id, tokens = self._ids[sequence], sequence.output_ids[sequence.num_reported :]
            error = sequence.error or self._keep_logits(sequence)
            if error is not None:
                self._report()
                self._refuse(request_id, error)
            else:
                self._unreported.append([request_id, tokens, sequence.finish_reason, _extras(sequence)])
            sequence.num_reported = len(sequence.output_ids)
            if sequence.finish_reason:
                self._release(sequence)

    def _report(self) -> None:
        if self._unreported:
            self._channel.send({"type": "tokens", "outputs": self._unreported})
            self._unreported = []
            self._last_sent = time.monotonic()

    def _tell_progress(self) -> None:
        """A client that hears nothing for long takes the engine for one that hangs."""
        if self._core.num_steps > self._num_steps_told and time.monotonic() - self._last_sent > PROGRESS_PERIOD_S:
            self._channel.send({"type": "progress"})
            self._num_steps_told, self._last_sent = self._core.num_steps, time.monotonic()

    def _refuse(self, request_id: int, error: PtError) -> None:
        self._channel.send({"type": "refused", "id": request_id, "kind": error.kind, "message": error.message})

    def _keep_logits(self, sequence: Sequence) -> PtError | None:
        """Of a prompt whose answer is complete. A disk that takes no more is the trouble of this request alone."""
        if not sequence.finish_reason or not sequence.prompt_logits:
            return None
        path = logits_file(self._folder, self._ids[sequence])
        try:
            write_logits(path, sequence.prompt_logits)
        except (OSError, PtError) as error:
            log_traceback(error)
            with contextlib.suppress(OSError):
                path.unlink()
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            return PtError(f"the prompt's logits could not be kept: {reason}", kind="failed")
        return None

    def _release(self, sequence: Sequence) -> None:
        del self._running[self._ids.pop(sequence)]


def _extras(sequence: Sequence) -> Message:
    """What goes with the latest tokens."""
    extras: Message = {}
    if sequence.stop_reason is not None:
        extras["stop_reason"] = sequence.stop_reason
    if sequence.logprobs:
        extras["logprobs"] = sequence.logprobs[sequence.num_reported :]
    if sequence.request.params.prompt_logprobs is not None and sequence.num_reported == 0:
        extras["prompt_logprobs"] = list(sequence.prompt_logprobs)  # a preemption clears the sequence's own
    return extras
