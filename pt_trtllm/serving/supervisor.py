"""An engine that is kept running: started, watched, ended when it hangs, and started again with back-off."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt_trtllm.errors import ConfigError, PtError, ServingError
from pt_trtllm.runtime.launch import stopped_processes, stopped_ranks
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.protocol import PROGRESS_PERIOD_S
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.world import Events, World
from pt_trtllm.serving.control import IS_RESTARTED, QUEUE_IS_FULL
from pt_trtllm.serving.threads import Complaints, start_essential

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
WATCH_PERIOD_S = 0.25
LATE_LOOK_S = 4 * WATCH_PERIOD_S
STOPPED_CHECKS, STOPPED_CHECKS_AT_START = 4, 10
"""A rank that is stopped in so many checks in a row will not come back by itself. A start is looked at more often."""
RESTART_FACTOR, RESTART_SLACK_S = 10.0, 60.0
"""A restart that takes so many times as long as the first start, and this, hangs."""
LOGGER = logging.getLogger("pt_trtllm.serving")


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
        self._closing = threading.Event()
        self._complain = Complaints(LOGGER.error)
        self._start_limit_s = math.inf
        started = time.monotonic()
        self._world: World | None = self._start()
        self._start_limit_s = RESTART_SLACK_S + RESTART_FACTOR * (time.monotonic() - started)
        self.config = self._world.config
        self._limit = self.config.limits.max_batch_size + settings.max_queue_size
        self._reason = ""
        self._watcher = start_essential("pt-trtllm-watch", self._watch)

    def submit(self, requests: Sequence[tuple[Request, Events]]) -> list[int]:
        """Sends requests to the engine. Raises when they are too many, now (QueueFull) or always (ConfigError), or when
        it does not run (Unavailable), and then none of them was sent."""
        if len(requests) > self._limit:
            raise ConfigError(
                f"{QUEUE_IS_FULL}: the request asks for {len(requests)} answers (prompts x num_return_sequences), the "
                f"batch and the queue hold {self._limit}; ask for fewer, or deploy with a larger --max-queue-size"
            )
        with self._lock:
            world = self._world
            if world is None:
                raise Unavailable(f"{IS_RESTARTED}: {self._reason}")
            if self._num_in_flight + len(requests) > self._limit:
                raise QueueFull(f"{QUEUE_IS_FULL}: {self._num_in_flight} requests are in flight, the batch "
                                f"and the queue hold {self._limit}; ask again later")  # fmt: skip
            self._num_in_flight += len(requests)
        try:
            return world.submit([(request, _Watched(events, self)) for request, events in requests])
        except BaseException as error:
            self._ended(len(requests))
            if isinstance(error, PtError):
                raise Unavailable(f"{IS_RESTARTED}: {error.message}") from None
            raise

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
        settings, started = self._settings, time.monotonic()
        num_stopped = 0

        def give_up(folder: Path) -> str:
            nonlocal num_stopped
            if self._closing.is_set():
                return "the engine was closed"
            if time.monotonic() - started > self._start_limit_s:
                return f"it did not start within {self._start_limit_s:.0f} s"
            stopped = stopped_processes(folder)
            num_stopped = num_stopped + 1 if stopped else 0
            return were_stopped(stopped) if num_stopped >= STOPPED_CHECKS_AT_START else ""

        return World(settings.engine_dir, settings.options, settings.hostfile, settings.tokenizer_dir, give_up)

    def _watch(self) -> None:
        """Nothing that goes wrong here may end this thread: the engine would never be started again."""
        watch = _Watch(self._settings.step_timeout_s)
        while not self._closing.wait(WATCH_PERIOD_S):
            world = self._world
            assert world is not None
            try:
                if reason := watch.what_is_wrong(world, self._num_in_flight):
                    world.abort(reason)
            except Exception as error:  # no descriptor may be left to look with: the next look may go better
                self._complain("the engine cannot be watched", error)
            if world.failure is not None:
                watch = _Watch(self._settings.step_timeout_s)
                self._restart(world, world.failure)

    def _restart(self, world: World, failure: PtError) -> None:
        with self._lock:
            self._world, self._reason = None, failure.message
        self._tell(False, str(failure))
        try:
            world.close()
        except Exception as error:
            self._complain("what the engine left could not be removed", error)
        wait_s = FIRST_BACK_OFF_S
        while not self._closing.wait(wait_s):
            try:
                started = self._start()
            except Exception as error:  # a full disk, no memory: whatever it is may pass
                self._reason = error.message if isinstance(error, PtError) else f"{type(error).__name__} at its start"
                self._tell(False, f"it could not be started: {type(error).__name__}: {error}")
                wait_s = min(2 * wait_s, LONGEST_BACK_OFF_S)
                continue
            with self._lock:
                self.num_restarts += 1
                self._world = started
            self._tell(True, "")
            return

    def _tell(self, is_ready: bool, reason: str) -> None:
        try:
            self._on_change(is_ready, reason)
        except Exception as error:
            self._complain(f"whoever was to hear of the engine ({reason or 'it runs again'}) failed", error)

    def _ended(self, count: int = 1) -> None:
        with self._lock:
            self._num_in_flight -= count


class _Watch:
    """Looks at a running engine from time to time."""

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._num_stopped = 0
        self._silence_s, self._last_look, self._num_signs = 0.0, time.monotonic(), 0

    def what_is_wrong(self, world: World, num_in_flight: int) -> str:
        """Why the engine must be ended; empty if all is well."""
        stopped = stopped_ranks(world.folder)
        self._num_stopped = self._num_stopped + 1 if stopped else 0
        if self._num_stopped >= STOPPED_CHECKS:
            return were_stopped(stopped)
        # A look that comes late says that this process did not run: then it has not heard of the ranks either.
        now, num_signs = time.monotonic(), world.num_signs_of_life
        passed_s, self._last_look = min(now - self._last_look, LATE_LOOK_S), now
        is_silent = num_in_flight and num_signs == self._num_signs
        self._silence_s, self._num_signs = self._silence_s + passed_s if is_silent else 0.0, num_signs
        if self._silence_s <= self._step_timeout_s + PROGRESS_PERIOD_S:
            return ""
        return (
            f"no step ended for {self._step_timeout_s:g} s with {num_in_flight} requests in flight "
            "(step_timeout_s); a rank hangs, or a step takes longer than that"
        )


def were_stopped(ranks: Sequence[str]) -> str:
    return f"{', '.join(ranks)} was stopped by a signal and does not answer"


class _Watched:
    """Passes a request's events on, and counts it out with the last one."""

    def __init__(self, events: Events, supervisor: EngineSupervisor) -> None:
        self._events, self._supervisor = events, supervisor

    def put(self, event: Any) -> None:
        if isinstance(event, BaseException) or event[2]:
            self._supervisor._ended()
        self._events.put(event)
