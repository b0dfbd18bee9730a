"""The kind of an error inside its text, for Triton carries little else.

Errors of a gRPC stream reach clients as text only, and an ensemble puts words of its own around that. So a model writes
the kind behind its message, and clients take it off again:

    Exceeds maximum queue size: 96 requests are in flight [error kind: queue_full, not taken]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from pt_trtllm.errors import KINDS, Kind, PtError, ServingError
from pt_trtllm.serving.control import QUEUE_IS_FULL

NOT_TAKEN = ", not taken"
MARK = re.compile(r"\s*\[error kind: (\w+)(, not taken)?\]")
FOLDERS = re.compile(r"(?<![\w.:/])(?:/[^\s/:'\"]+)+/(?=[^\s/:'\"])")
"""Of absolute paths: where a server keeps its files is not for its clients."""
NOT_LOADED = "has no available versions"
"""Triton says so of a model that it knows, but does not have: ours while the engine is down (`models/health.py`)."""
SAYINGS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(QUEUE_IS_FULL), "queue_full"),
    (re.compile(f"{NOT_LOADED}|being restarted|not ready|shutting down|unavailable", re.I), "unavailable"),
    (re.compile("exceeds maximum (input|sequence) length"), "too_long"),
    (re.compile("expected|not support|outside the vocabulary|is empty|invalid", re.I), "invalid"),
)
"""What Triton itself and TensorRT-LLM's own backend say, who know no marks. Anything else is a server failure."""


@dataclass(frozen=True)
class Told:
    """What a server said went wrong."""

    message: str
    kind: Kind
    was_taken: bool
    """False: nothing was done for the request, which may be sent again."""

    def as_error(self, where: str = "") -> ServingError:
        return ServingError(where + self.message, kind=self.kind, was_taken=self.was_taken)


def marked(error: Exception) -> str:
    """One line for clients. What is not this package's error says nothing about itself: its text is for the log."""
    if not isinstance(error, PtError):
        error = ServingError(f"the server failed at this request ({type(error).__name__}); its log says more")
    message = " ".join(error.message.split())
    if error.kind in ("unavailable", "failed"):  # the others are about what the client sent
        message = FOLDERS.sub("", message)
    return f"{message} [error kind: {error.kind}{'' if error.was_taken else NOT_TAKEN}]"


def read_mark(text: str) -> Told:
    """The last mark counts: what a client sent, and finds quoted in the message, stands before it."""
    found = list(MARK.finditer(text))
    if not found:
        kind: Kind = next((kind for pattern, kind in SAYINGS if pattern.search(text)), "failed")
        return Told(text, kind, was_taken=kind != "queue_full" and NOT_LOADED not in text)
    start, end = found[-1].span()
    kind = cast(Kind, found[-1][1]) if found[-1][1] in KINDS else "failed"
    return Told(text[:start] + text[end:], kind, was_taken=found[-1][2] is None)
