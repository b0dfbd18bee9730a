"""Clients that keep asking."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from pt_trtllm.testing.soak.clients import SoakClient
from pt_trtllm.testing.soak.requests import PATHS, Ending, Plan

FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0
"""Before a request that was not taken is sent again, as `Client` waits."""


class Load:
    """Runs plans on threads of their own."""

    def __init__(
        self,
        plans: Iterator[Plan],
        make_client: Callable[[], SoakClient],
        num_clients: int,
        *,
        at_least: int,
        end_s: float,
    ) -> None:
        """Goes on until so many requests have begun and `finish` was called; none is begun after `end_s`."""
        self._plans, self._make_client, self._left = plans, make_client, at_least
        self._may_end = False
        self._give_up = time.monotonic() + end_s
        self._changed = threading.Condition()
        self.endings: list[Ending] = []
        self.num_refusals = 0
        self._threads = [threading.Thread(target=self._run, name=f"client-{i}") for i in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def wait_for_answers_begun_after(self, moment: float, timeout_s: float) -> float | None:
        """When every door had answered a request that began after that moment; None where one of them has not."""

        def firsts() -> dict[str, float]:
            found: dict[str, float] = {}
            for ending in self.endings:
                if ending.how == "answered" and ending.began > moment:
                    found.setdefault(ending.plan.path, ending.ended)
            return found

        with self._changed:
            self._changed.wait_for(lambda: len(firsts()) == len(PATHS) or not self.is_alive(), timeout_s)
            found = firsts()
        return max(found.values()) if len(found) == len(PATHS) else None

    def wait_for_endings(self, count: int, timeout_s: float) -> None:
        """So many more."""
        with self._changed:
            goal = len(self.endings) + count
            self._changed.wait_for(lambda: len(self.endings) >= goal or not self.is_alive(), timeout_s)

    def is_alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def finish(self) -> None:
        self._may_end = True
        for thread in self._threads:
            thread.join()

    def counts(self) -> Counter[str]:
        return Counter(ending.how for ending in self.endings)

    def _run(self) -> None:
        client = self._make_client()
        try:
            while time.monotonic() < self._give_up and (plan := self._next()) is not None:
                wait_s = FIRST_RETRY_S
                while (ending := client.ask(plan)).how == "refused" and time.monotonic() < self._give_up:
                    self.num_refusals += 1
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_RETRY_S)
                with self._changed:
                    self.endings.append(ending)
                    self._changed.notify_all()
        finally:
            client.close()
            with self._changed:
                self._changed.notify_all()

    def _next(self) -> Plan | None:
        with self._changed:
            if self._may_end and self._left <= 0:
                return None
            self._left -= 1
            return next(self._plans)
