"""The one tree of errors. Messages say what was found, what was expected, where, and what to do.

An error's kind travels with it from the engine to every door (gRPC, HTTP, Python), which maps it to its own codes once:

    invalid       the request is wrong
    too_long      it is longer than the context, or than the whole KV cache
    queue_full    too many requests wait already
    unavailable   the engine is being restarted, is shutting down, or lost its ranks
    failed        this request failed by itself, and the engine goes on
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

Kind = Literal["invalid", "too_long", "queue_full", "unavailable", "failed"]
KINDS: frozenset[Kind] = frozenset(get_args(Kind))


class PtError(Exception):
    """Base of everything this package raises on purpose; the CLI prints it as one line and exits with 2."""

    default_kind: ClassVar[Kind] = "failed"

    def __init__(
        self, message: str = "", *, kind: Kind | None = None, detail: str = "", was_taken: bool = True
    ) -> None:
        """`detail` is for the server's own people: its log and command line show it, its clients do not see it.
        `was_taken` is False where a request was refused before anything was done for it: it may be sent again."""
        super().__init__(message + detail)
        self.message, self.kind, self.was_taken = message, kind or self.default_kind, was_taken


class ConfigError(PtError):
    """A model configuration, a mapping or an option is invalid."""

    default_kind = "invalid"


class CheckpointError(PtError):
    """A checkpoint is missing, incomplete, malformed or does not match its configuration."""


class EngineError(PtError):
    """An engine cannot be built, opened or run here."""

    default_kind = "unavailable"


class CommunicationError(PtError):
    """A collective failed: a rank died, hung, aborted, or the ranks disagree."""

    default_kind = "unavailable"


class ServingError(PtError):
    """A server could not be started, reached, or answered with an error."""


def error_of_kind(kind: Kind, message: str) -> PtError:
    """What rank 0 says of one request, as an exception on its client's side."""
    return (ConfigError if kind in ("invalid", "too_long") else EngineError)(message, kind=kind)
