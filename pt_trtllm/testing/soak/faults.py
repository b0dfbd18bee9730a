"""Signals for ranks and model processes at random moments, and how long no request was answered after each."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass

from pt_trtllm.testing.soak.load import Load
from pt_trtllm.testing.soak.service import KeptService
from pt_trtllm.testing.triton import ranks_of

RANK, MODEL = "rank", "model process"
RECOVERY_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    target: str
    number: signal.Signals
    outage_s: float | None
    """From the signal until every door has answered a request that began after it; None where one never did."""


def draw_faults(count: int, targets: tuple[str, ...], rng: random.Random) -> list[tuple[str, signal.Signals]]:
    return [(rng.choice(targets), rng.choice((signal.SIGKILL, signal.SIGSTOP))) for _ in range(count)]


def inject(service: KeptService, load: Load, target: str, number: signal.Signals, rng: random.Random) -> Fault | None:
    """Waits until everything runs, hits one process, and waits until requests are answered again. None: out of time."""
    load.wait_for_endings(rng.randrange(30, 90), RECOVERY_S)
    pids: list[int] = []
    while not pids and load.is_alive():  # ranks are being started
        pids = service.model_processes() if target == MODEL else sorted(ranks_of(service).values())
        time.sleep(0 if pids else 0.1)
    if not load.is_alive():
        return None
    began = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(pids), number)
    ended = load.wait_for_answers_begun_after(began, RECOVERY_S)
    if ended is None and not load.is_alive():
        return None  # the clients may begin nothing any more
    return Fault(target=target, number=number, outage_s=None if ended is None else ended - began)
