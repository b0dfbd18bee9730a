"""The draft engine in a world of its own: it guesses ahead while the engine verifies what it guessed before.

client to draft     {"type": "start", "id", "request", "seed"}   {"type": "end", "id"}   {"type": "shutdown"}
                    {"type": "decide", "decided": [[id, [token, ...]], ...]}
draft to client     {"type": "ready"}
                    {"type": "guesses", "guesses": [[id, number of decided tokens before them, [token, ...]], ...]}
Guesses that come late are compared with what was decided meanwhile: those that agree still serve.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence as SequenceABC
from pathlib import Path
from typing import IO

from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.protocol import Channel, Inbox, Message, request_from_json, request_to_json
from pt_trtllm.runtime.request import Sequence
from pt_trtllm.runtime.speculative.draft_model import DraftModel, Mirror
from pt_trtllm.runtime.world import World

LAUNCHERS_OWN = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPI_LOCAL")
ALL_CORES = os.sched_getaffinity(0)
"""Read when the program starts: later, a rank binds itself to its own."""


class DraftService:
    """Rank 0 of the draft's world. Guesses up to `lead` tokens ahead of what it knows."""

    def __init__(self, model: DraftModel, channel: Channel, lead: int) -> None:
        self._model, self._channel, self._lead = model, channel, lead
        self._mirrors: dict[int, Mirror] = {}

    def run(self) -> None:
        self._inbox = Inbox(self._channel)
        self._channel.send({"type": "ready"})
        may_advance = False
        while self._take_messages(wait=not may_advance):
            advanced = self._model.advance(list(self._mirrors.values()), self._lead)
            may_advance = bool(advanced)
            if advanced:
                ids = {mirror: number for number, mirror in self._mirrors.items()}
                guesses = [[ids[mirror], mirror.num_decided, mirror.guesses] for mirror in advanced]
                self._channel.send({"type": "guesses", "guesses": guesses})

    def _take_messages(self, *, wait: bool) -> bool:
        """Handles what has arrived; sleeps while there is nothing to guess. False: shut down."""
        while wait or not self._inbox.empty():
            message, wait = self._inbox.get(), False
            if message["type"] == "shutdown":
                return False
            if message["type"] == "start":
                mirror = self._model.start(request_from_json(message["request"]), message["seed"])
                if mirror is not None:
                    self._mirrors[message["id"]] = mirror
            elif message["type"] == "decide":
                for number, tokens in message["decided"]:
                    if number in self._mirrors:
                        self._model.decide(self._mirrors[number], tokens)
            elif message["type"] == "end" and message["id"] in self._mirrors:
                self._model.end(self._mirrors.pop(message["id"]))
        return True


class DraftWorld(World):
    """The draft's ranks as child processes; keeps the latest guesses of every sequence."""

    def __init__(self, engine_dir: Path, options: RuntimeOptions, hostfile: Path | None) -> None:
        self.news = threading.Condition()
        self.guesses: dict[int, tuple[int, list[int]]] = {}
        """By sequence: how many decided tokens they follow, and the guesses."""
        super().__init__(engine_dir, options, hostfile)

    def _check_outside_mpi(self) -> None:
        """This world is started by rank 0 of another one."""

    def _launch(self, command: list[str], log: IO[str]) -> subprocess.Popen[bytes]:
        """Without what the launcher of this process told it, and on all the cores that it had."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS_OWN)}
        own_cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, ALL_CORES)
        try:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        finally:
            os.sched_setaffinity(0, own_cores)

    @property
    def alive(self) -> bool:
        return self._failure is None

    def tell(self, message: Message) -> None:
        self._send(message)

    def _dispatch(self, message: Message) -> None:
        if message["type"] == "guesses":
            with self.news:
                self.guesses.update({number: (decided, tokens) for number, decided, tokens in message["guesses"]})
                self.news.notify_all()


class OwnRanksProposer:
    """Tells the draft's world what was decided, and takes the guesses that are there.

    Guesses that are not there yet are waited for, but no longer than the last step took: a slow draft cannot more than
    double the time of a step, and one that died does not hold answers up.
    """

    def __init__(self, world: DraftWorld, max_draft_len: int) -> None:
        self._world, self._max_draft_len = world, max_draft_len
        self._numbers: dict[Sequence, int] = {}
        self._told: dict[Sequence, int] = {}
        self._num_started = 0
        self._last_propose = time.monotonic()

    def propose(self, sequences: SequenceABC[Sequence]) -> None:
        patience = min(1.0, time.monotonic() - self._last_propose)
        self._tell(sequences)
        with self._world.news:
            self._world.news.wait_for(lambda: all(map(self._has_enough, sequences)), patience)
            for sequence in sequences:
                sequence.guesses = self._known(sequence)[: self._max_draft_len]
        self._last_propose = time.monotonic()

    def forget(self, sequence: Sequence) -> None:
        number = self._numbers.pop(sequence, None)
        self._told.pop(sequence, None)
        if number is not None:
            self._world.tell({"type": "end", "id": number})
            with self._world.news:
                self._world.guesses.pop(number, None)

    def close(self) -> None:
        self._world.close()

    def _tell(self, sequences: SequenceABC[Sequence]) -> None:
        decided = []
        for sequence in sequences:
            if sequence not in self._numbers:
                number = self._numbers[sequence] = self._num_started
                self._num_started += 1
                self._told[sequence] = 0
                request = request_to_json(sequence.request)
                self._world.tell({"type": "start", "id": number, "request": request, "seed": sequence.sampler.seed})
            decided.append([self._numbers[sequence], sequence.output_ids[self._told[sequence] :]])
            self._told[sequence] = len(sequence.output_ids)
        self._world.tell({"type": "decide", "decided": decided})

    def _has_enough(self, sequence: Sequence) -> bool:
        left = sequence.max_new_tokens - len(sequence.output_ids) - 1
        return not self._world.alive or len(self._known(sequence)) >= min(self._max_draft_len, left)

    def _known(self, sequence: Sequence) -> list[int]:
        """The latest guesses, as far as they agree with what was decided since, without what they have in common."""
        decided, guesses = self._world.guesses.get(self._numbers[sequence], (0, []))
        since = sequence.output_ids[decided:]
        return guesses[len(since) :] if guesses[: len(since)] == since else []
