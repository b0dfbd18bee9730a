"""The routes that clients may use; each request goes whole to Triton, each response comes back as it is made."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
from aiohttp import web
from yarl import URL

from pt_trtllm.errors import ConfigError
from pt_trtllm.serving.front.checks import MAX_BODY_BYTES, check_body

MODEL = r"/v2/models/[\w.+-]+(/versions/\d+)?"
READ = re.compile(rf"/v2|/v2/health/(live|ready)|/v2/models/stats|{MODEL}(/(ready|config|stats))?", re.ASCII)
ASK = re.compile(rf"{MODEL}/(infer|generate|generate_stream)", re.ASCII)
MANAGE = re.compile(r"/v2/repository/(index|models/[\w.+-]+/(load|unload))", re.ASCII)
METRICS = re.compile(r"/metrics")
CLOSED = re.compile(r"/v2/(repository|systemsharedmemory|cudasharedmemory|logging|trace)\b.*|.*/trace/setting")
JSON_LENGTH = "Inference-Header-Content-Length"
OF_ONE_CONNECTION = frozenset(
    {"connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)
CONNECT_S = 10.0
READ_S = 120.0
"""For a body to arrive."""


class Front:
    """One of Triton's services on a private socket, for everybody."""

    def __init__(self, triton: Path, *, gets: re.Pattern[str], posts: Sequence[re.Pattern[str]] = ()) -> None:
        self._triton, self._gets, self._posts = triton, gets, posts
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._answer)
        app.cleanup_ctx.append(self._connections)
        return app

    async def _connections(self, app: web.Application) -> AsyncIterator[None]:
        """A connection of its own for every request: one that is closed is how Triton hears of a client that left."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self._triton), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        async with self._session:
            yield

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        is_post = any(pattern.fullmatch(path) for pattern in self._posts)
        if not is_post and not self._gets.fullmatch(path):
            if CLOSED.fullmatch(path):
                return _refusal(403, f"{path} is closed: it changes the server, or reads and writes memory for others")
            return _refusal(404, f"{path}: there is nothing here")
        if request.method != ("POST" if is_post else "GET"):
            return _refusal(405, f"{path} does not take {request.method}")
        try:
            body = await asyncio.wait_for(request.read(), READ_S)  # also puts chunks together and decompresses
            if ASK.fullmatch(path):
                check_body(body, request.headers.get(JSON_LENGTH))
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, f"the body has more than {MAX_BODY_BYTES} bytes; the gRPC port takes more")
        except asyncio.TimeoutError:
            return _refusal(408, f"the body did not arrive within {READ_S:g} s")
        except web.RequestPayloadError as error:
            return _refusal(400, f"the body cannot be read: {' '.join(str(error).split())[:200]}")
        except ConfigError as error:
            return _refusal(400, str(error))
        return await self._forward(request, path, body)

    async def _forward(self, request: web.Request, path: str, body: bytes) -> web.StreamResponse:
        assert self._session is not None
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in OF_ONE_CONNECTION]
        if body:  # it is decompressed by now
            headers = [(name, value) for name, value in headers if name.lower() != "content-encoding"]
        url = URL.build(scheme="http", host="triton", path=path, encoded=True)
        try:
            upstream = await self._session.request(
                request.method, url, data=body or None, headers=headers, allow_redirects=False
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            return _refusal(503, f"Triton does not answer: {type(error).__name__}")
        async with upstream:
            response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
            for name, value in upstream.headers.items():
                if name.lower() not in OF_ONE_CONNECTION:
                    response.headers.add(name, value)
            if upstream.content_length is not None:
                response.content_length = upstream.content_length
            await response.prepare(request)
            async for piece in upstream.content.iter_any():
                await response.write(piece)
            await response.write_eof()
        return response


def _refusal(status: int, message: str) -> web.Response:
    """In the form of Triton's own."""
    return web.json_response({"error": message}, status=status)
