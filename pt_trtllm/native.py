"""Finds and loads the C++ libraries that are built with the package, and declares their functions."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pt_trtllm
from pt_trtllm.env import Variable
from pt_trtllm.errors import PtError
from pt_trtllm.trace import CallTimer

Signatures = dict[str, tuple[Any, list[Any]]]
"""function -> (type of its result, types of its arguments)"""


def library_path(file_name: str, override: Variable, error: type[PtError]) -> Path:
    """What `override` names, else `lib/` beside the package. Raises with how to build it."""
    chosen = override.get()
    if chosen:
        if not Path(chosen).is_file():
            raise error(f"{override.name} is {chosen!r}: no such file")
        return Path(chosen)
    # An editable install has the sources and the built files in two entries.
    candidates = [Path(entry) / "lib" / file_name for entry in pt_trtllm.__path__]
    for path in candidates:
        if path.is_file():
            return path
    raise error(
        f"{file_name} not found (looked at {', '.join(map(str, candidates))}). Build it with `pip install -e .`, or "
        f"`cmake -S plugins -B build/plugins && cmake --build build/plugins` and set {override.name} to the file"
    )


_timing: tuple[CallTimer, str] | None = None


def time_calls(timer: CallTimer, *, besides: str) -> None:
    """Adds up the calls of all libraries that are loaded from now on, but for the one named."""
    global _timing
    _timing = timer, besides


def timed(function: Callable[..., Any], timer: CallTimer) -> Callable[..., Any]:
    """The same function; its time is added up."""

    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        timer.seconds += time.perf_counter() - start
        timer.calls += 1
        return result

    return call


def load_library(path: Path, signatures: Signatures, version: tuple[str, int], error: type[PtError]) -> ctypes.CDLL:
    """Loads a library; refuses one of another version. `version`: the function that tells it, and what it must be."""
    try:
        library = ctypes.CDLL(str(path))  # CDLL releases the GIL during calls
    except OSError as reason:
        raise error(f"cannot load {path}: {reason}") from reason
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise error(f"{path} has no function {name}: it belongs to another version, build it again")
        function.restype, function.argtypes = result, arguments
        if _timing is not None and path.name != _timing[1]:
            setattr(library, name, timed(function, _timing[0]))
    found = getattr(library, version[0])()
    if found != version[1]:
        raise error(f"{path} has ABI version {found}, expected {version[1]}: build it again")
    return library
