"""Rank 0's loop: takes requests from a channel between steps, sends tokens after each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pt_trtllm.errors import PtError
from pt_trtllm.runtime.core import EngineCore
from pt_trtllm.runtime.protocol import (
    PROGRESS_PERIOD_S,
    Channel,
    Inbox,
    Message,
    logits_file,
    request_from_json,
    write_logits,
)
from pt_trtllm.runtime.request import Sequence


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
            if message["type"] == "shutdown":
                return False
            if message["type"] == "submit":
                for request_id, request in message["requests"]:
                    self._submit(request_id, request)
            elif message["type"] == "cancel":
                self._cancel(message["id"])
            elif message["type"] == "stats":
                self._channel.send({"type": "stats", "stats": self._core.stats().to_json()})
            self._core.trace.lap("messages")
        return True

    def _submit(self, request_id: int, request: Message) -> None:
        try:
            sequence = self._core.add(request_from_json(request))
        except PtError as error:
            self._channel.send({"type": "refused", "id": request_id, "kind": error.kind, "message": error.message})
            return
        self._running[request_id] = sequence
        self._ids[sequence] = request_id

    def _cancel(self, request_id: int) -> None:
        sequence = self._running.get(request_id)
        if sequence is None:
            return  # it ended before the message came
        self._report()
        self._core.cancel(sequence)
        self._finish(sequence)
        self._channel.send({"type": "tokens", "outputs": [[request_id, [], "cancelled", {}]]})

    def _note(self, advanced: list[Sequence]) -> None:
        """Keeps what a step gave for the next report, so that the other ranks need not wait for it."""
        outputs = [[self._ids[s], s.output_ids[s.num_reported :], s.finish_reason, _extras(s)] for s in advanced]
        for sequence in advanced:
            sequence.num_reported = len(sequence.output_ids)
            if sequence.finish_reason:
                self._finish(sequence)
        self._unreported += outputs

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

    def _finish(self, sequence: Sequence) -> None:
        request_id = self._ids.pop(sequence)
        del self._running[request_id]
        if sequence.prompt_logits:
            write_logits(logits_file(self._folder, request_id), sequence.prompt_logits)


def _extras(sequence: Sequence) -> Message:
    """What goes with the latest tokens."""
    extras: Message = {}
    if sequence.stop_reason is not None:
        extras["stop_reason"] = sequence.stop_reason
    if sequence.logprobs:
        extras["logprobs"] = sequence.logprobs[sequence.num_reported :]
    if sequence.request.params.prompt_logprobs is not None and sequence.num_reported == 0:
        extras["prompt_logprobs"] = sequence.prompt_logprobs
    return extras
