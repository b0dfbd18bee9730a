"""A request's body as JSON that everything behind it can work with: bounded, and without numbers or texts that nothing
else can hold."""

from __future__ import annotations

import asyncio
import codecs
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

from aiohttp import web

from pt_trtllm.openai.errors import TOO_MANY, ApiError

MAX_BODY_BYTES = 16 << 20
LARGE_BYTES = 1 << 18
MAX_LARGE = 4
"""Bodies above `LARGE_BYTES` as Python's objects at a time, where JSON takes up to twenty times its length."""
MAX_HELD_BYTES = 1 << 28
"""Of all bodies that have arrived, or a part of them, and are not worked off."""
READ_TIMEOUT_S = 120.0
"""For a body to arrive."""
MAX_DEPTH = 128
"""Of lists and objects inside each other; what reads them later is recursive."""
MAX_CONTAINERS = 1 << 18
"""Each of three bytes may become a hundred: millions of them stop everything else while they are made."""
ENCODINGS = ("utf-8", "ascii")
Parsed = TypeVar("Parsed")


class Bodies:
    def __init__(self) -> None:
        self._large = asyncio.Semaphore(MAX_LARGE)
        self._held = 0

    @asynccontextmanager
    async def parsed(self, request: web.Request, parse: Callable[[Any], Parsed]) -> AsyncIterator[Parsed]:
        """What is made of a body, for as long as that is in memory. Bodies arrive side by side, so that none waits for
        one that is slow; only the work on large ones waits for each other."""
        _check_head(request)
        body = bytearray()
        try:
            try:
                await asyncio.wait_for(self._receive(request, body), READ_TIMEOUT_S)
            except asyncio.TimeoutError:
                raise ApiError(f"the body did not arrive within {READ_TIMEOUT_S:g} s", status=408) from None
            if len(body) <= LARGE_BYTES:
                yield parse(parse_json(body))
            else:
                async with self._large:
                    yield await asyncio.to_thread(lambda: parse(parse_json(body)))
        finally:
            self._held -= len(body)

    async def _receive(self, request: web.Request, body: bytearray) -> None:
        async for piece in request.content.iter_any():
            if self._held + len(piece) > MAX_HELD_BYTES:
                raise ApiError(
                    f"bodies of {MAX_HELD_BYTES} bytes are in memory, which is all that this server takes; try again "
                    "later",
                    status=TOO_MANY,
                )
            self._held += len(piece)
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, len(body))


def _check_head(request: web.Request) -> None:
    # Pages of other sites can post anything but this type without asking the browser's permission first.
    if request.content_type != "application/json":
        raise ApiError(f"Content-Type is {request.content_type}, expected application/json", status=415)
    _check_charset(request.charset)
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ApiError(f"Content-Encoding is {encoding!r:.40}, expected a body as it is", status=415)


def _check_charset(charset: str | None) -> None:
    try:
        if charset is None or codecs.lookup(charset).name in ENCODINGS:
            return
    except (LookupError, ValueError):
        pass
    raise ApiError(f"Content-Type has the charset {charset!r:.40}, expected utf-8", status=415)


def parse_json(body: bytes | bytearray) -> Any:
    """Raises one clear line for what is not JSON, or is JSON that only a parser can bear."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise ApiError(f"the body has too many brackets, expected at most {MAX_CONTAINERS} of [ and {{ together")
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python's own limit on digits
        raise ApiError("the body has a number of thousands of digits") from None
    _check_values(value, may_have_surrogates=b"\\u" in body)
    return value


def _check_values(value: Any, *, may_have_surrogates: bool) -> None:
    """One level after the other: whatever is recursive could be sent something too deep for it."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                below += entry.values()
                if may_have_surrogates:
                    below += entry
            elif isinstance(entry, list):
                below += entry
            elif isinstance(entry, str):
                if may_have_surrogates:
                    _check_text(entry)
            elif isinstance(entry, float):
                if not math.isfinite(entry):
                    raise ApiError("the body has a number beyond what 64 bits hold")
            elif isinstance(entry, int) and not -(1 << 63) <= entry < 1 << 64:
                raise ApiError("the body has a number beyond what 64 bits hold")
        if not below:
            return
        level = below
    raise _too_deep()


def _check_text(text: str) -> None:
    """JSON's escapes can spell halves of characters, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"a text is not valid Unicode: {error.reason} at character {error.start}") from None


def _too_deep() -> ApiError:
    return ApiError(f"the body is nested too deeply, expected at most {MAX_DEPTH} levels")


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(f"the body is not JSON: {name} is no number of JSON's")
