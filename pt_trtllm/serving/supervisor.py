"""An engine that is kept running: started, watched, ended when it hangs, and started again with back-off."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt_trtllm.errors import PtError, ServingError
from pt_trtllm.runtime.launch import stopped_ranks
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.world import Events, World
from pt_trtllm.serving.control import IS_RESTARTED, QUEUE_IS_FULL

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
WATCH_PERIOD_S = 0.25
STOPPED_CHECKS = 4
"""A rank that is stopped in so many checks in a row will not come back by itself."""


class QueueFull(ServingError):
    """There are as many requests as there may be."""

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="queue_full", was_taken=False)


class Unavailable(ServingError):
    """The engine is being restarted."""

    def __init__(self, message: str) -> None:
        super().__init__(message, kind="unavailable", was_taken=False)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    engine_dir: Path
    tokenizer_dir: Path | None = None
    hostfile: Path | None = None
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    max_queue_size: int = 256
    step_timeout_s: float = 60.0


class EngineSupervisor:
    """Many threads may submit; their requests share the engine's batches."""

    def __init__(
        self,
        settings: EngineSettings,
        on_change: Callable[[bool, str], None] = lambda ready, reason: None,
    ) -> None:
        """Returns when the engine is loaded, raises when it cannot be. `on_change` hears of failures and recoveries."""
        self._settings, self._on_change = settings, on_change
        self.num_restarts = 0
        self._lock = threading.Lock()
        self._num_in_flight = 0
        self._last_event = time.monotonic()
        self._world: World | None = self._start()
        self.config = self._world.config
        self._limit = self.config.limits.max_batch_size + settings.max_queue_size
        self._reason = ""
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="pt-trtllm-watch", daemon=True)
        self._watcher.start()

    def submit(self, requests: Sequence[tuple[Request, Events]]) -> list[int]:
        """Sends requests to the engine. Raises QueueFull or Unavailable, and then none of them was sent."""
        with self._lock:
            world = self._world
            if world is None:
                raise Unavailable(f"{IS_RESTARTED}: {self._reason}")
            if self._num_in_flight + len(requests) > self._limit:
                raise QueueFull(f"{QUEUE_IS_FULL}: {self._num_in_flight} requests are in flight, the batch "
                                f"and the queue hold {self._limit}; ask again later")  # fmt: skip
            if not self._num_in_flight:
                self._last_event = time.monotonic()
            self._num_in_flight += len(requests)
        try:
            return world.submit([(request, _Watched(events, self)) for request, events in requests])
        except PtError as error:
            self._ended(len(requests))
            raise Unavailable(f"{IS_RESTARTED}: {error.message}") from None

    def cancel(self, request_id: int) -> None:
        """Without effect when the request, or its engine, has ended."""
        world = self._world
        if world is not None:
            world.cancel(request_id)

    def stats(self) -> dict[str, Any] | None:
        """What the engine did since it was started; None while it is not running."""
        world = self._world
        if world is None:
            return None
        with contextlib.suppress(PtError):
            return world.stats()
        return None

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    def close(self) -> None:
        """Ends every process of the engine."""
        self._closing.set()
        self._watcher.join()
        with self._lock:
            world, self._world = self._world, None
        if world is not None:
            world.close()

    def _start(self) -> World:
        settings = self._settings
        return World(settings.engine_dir, settings.options, settings.hostfile, settings.tokenizer_dir)

    def _watch(self) -> None:
        num_stopped = 0
        while not self._closing.wait(WATCH_PERIOD_S):
            world = self._world
            assert world is not None
            stopped = stopped_ranks(world.folder, world.config.mapping.world_size)
            num_stopped = num_stopped + 1 if stopped else 0
            if num_stopped >= STOPPED_CHECKS:
                world.abort(f"{', '.join(stopped)} was stopped by a signal and does not answer")
            elif self._num_in_flight and time.monotonic() - self._last_event > self._settings.step_timeout_s:
                world.abort(
                    f"no token came for {self._settings.step_timeout_s:g} s with {self._num_in_flight} requests in "
                    "flight (step_timeout_s); a rank hangs, or a step takes longer than that"
                )
            if world.failure is not None:
                num_stopped = 0
                self._restart(world, world.failure)

    def _restart(self, world: World, failure: PtError) -> None:
        with self._lock:
            self._world, self._reason = None, str(failure)
        self._on_change(False, str(failure))
        world.close()
        wait_s = FIRST_BACK_OFF_S
        while not self._closing.wait(wait_s):
            try:
                started = self._start()
            except PtError as error:
                self._reason = str(error)
                self._on_change(False, str(error))
                wait_s = min(2 * wait_s, LONGEST_BACK_OFF_S)
                continue
            with self._lock:
                self.num_restarts += 1
                self._world = started
            self._on_change(True, "")
            return

    def _heard(self) -> None:
        self._last_event = time.monotonic()

    def _ended(self, count: int = 1) -> None:
        with self._lock:
            self._num_in_flight -= count


class _Watched:
    """Passes a request's events on, and counts it out with the last one."""

    def __init__(self, events: Events, supervisor: EngineSupervisor) -> None:
        self._events, self._supervisor = events, supervisor

    def put(self, event: Any) -> None:
        self._supervisor._heard()
        if isinstance(event, BaseException) or event[2]:
            self._supervisor._ended()
        self._events.put(event)
