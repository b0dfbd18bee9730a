"""TensorRT's side channels: what it says while it builds, and how far it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pt_trtllm.engine.tensorrt.library import Library

KEPT_ERRORS = 3
MESSAGE_CHARS = 600


class Messages:
    """What TensorRT said so far: errors are kept for the exception, warnings go to `warn`."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.errors: list[str] = []
        self._warn = warn

    def take(self, is_error: bool, text: str) -> None:
        text = " ".join(text.split())
        if is_error:
            self.errors.append(text)
        else:
            self._warn(text)

    def summary(self) -> str:
        """The first errors, which later ones follow from, as one line."""
        shown = [text if len(text) <= MESSAGE_CHARS else f"{text[:MESSAGE_CHARS]}..." for text in self.errors]
        return "; ".join(shown[:KEPT_ERRORS]) or "no message"


def make_logger(library: Library, messages: Messages) -> Any:
    """An `ILogger` for `messages`. TensorRT takes one per process: the first."""
    severity = library.module.ILogger.Severity
    errors = (severity.ERROR, severity.INTERNAL_ERROR)

    class Logger(library.module.ILogger):  # type: ignore[misc, name-defined]  # the package is chosen at run time
        def log(self, level: Any, text: str) -> None:
            if level in errors or level == severity.WARNING:
                messages.take(level in errors, text)

    logger = Logger()
    library.module.ILogger.__init__(logger)
    return logger


class Phases:
    """The share that is done, 0 to 1, of a tree of phases of unknown depth: each step of a phase counts the same."""

    def __init__(self) -> None:
        self._phases: list[tuple[str, int, int]] = []
        """(name, steps, steps done) from the outermost to the innermost."""
        self.fraction = 0.0

    def start(self, name: str, num_steps: int) -> None:
        self._phases.append((name, max(1, num_steps), 0))

    def step(self, name: str, step: int) -> None:
        self._phases = [(n, steps, max(done, step + 1) if n == name else done) for n, steps, done in self._phases]
        self._update()

    def finish(self, name: str) -> None:
        while self._phases and self._phases.pop()[0] != name:
            pass
        self._update()

    def _update(self) -> None:
        share, fraction = 1.0, 0.0
        for _, steps, done in self._phases:
            share /= steps
            fraction += share * done
        self.fraction = max(self.fraction, min(1.0, fraction))


@functools.cache
def _monitor_class(library: Library) -> type:
    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self, report: Callable[[float], None]) -> None:
            library.module.IProgressMonitor.__init__(self)
            self._phases, self._report = Phases(), report

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self._phases.start(name, num_steps)

        def step_complete(self, name: str, step: int) -> bool:
            self._phases.step(name, step)
            self._report(self._phases.fraction)
            return True

        def phase_finish(self, name: str) -> None:
            self._phases.finish(name)

    return Monitor


def make_monitor(library: Library, report: Callable[[float], None]) -> Any | None:
    """An `IProgressMonitor` that reports the share that is done; None where the package has none."""
    return _monitor_class(library)(report) if hasattr(library.module, "IProgressMonitor") else None
