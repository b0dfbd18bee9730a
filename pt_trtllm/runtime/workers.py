"""Threads for work that must not hold up the engine's own."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """Do what is submitted, in order, from when they are first needed until the process ends."""

    def __init__(self, name: str, count: int, *, stack_bytes: int, niceness: int = 0) -> None:
        """`niceness`: how far they stand back where there are too few cores."""
        self._name, self._count, self._stack_bytes, self._niceness = name, count, stack_bytes, niceness
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, work: Callable[[], T]) -> Future[T]:
        if len(self._threads) < self._count:
            self._start()
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except BaseException as error:  # a panic of a Rust library is not an Exception
                future.set_exception(error)
            else:
                future.set_result(result)

        self._jobs.put(job)
        return future

    def _start(self) -> None:
        before = threading.stack_size(self._stack_bytes)
        try:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
        self._threads.append(thread)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # it is a courtesy
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while True:
            self._jobs.get()()
