"""The front end's routes, and what happens around every request."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pt_trtllm.openai.body import MAX_BODY_BYTES
from pt_trtllm.openai.errors import TOO_MANY, UNAUTHORIZED, UNAVAILABLE, ApiError
from pt_trtllm.openai.handlers import Handlers
from pt_trtllm.openai.keys import Keys
from pt_trtllm.openai.log import log_request, refusal_of
from pt_trtllm.openai.metrics import Metrics
from pt_trtllm.openai.model import ServedModel
from pt_trtllm.openai.options import FrontEndOptions
from pt_trtllm.openai.page import load_page
from pt_trtllm.openai.triton import TritonModel

METRICS_TIMEOUT_S = 5.0
CLIENT_LEFT = 499
GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
REQUEST_ID = web.RequestKey("request_id", str)
QUIET = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
"""Asked every few seconds by machines: neither logged nor counted."""
OPEN = frozenset({"/", "/health", "/health/live", "/health/ready"})
"""Without a key: what machines ask that have none, and the page, which asks its visitor for one."""
LATER = {"Retry-After": "1"}
HEADERS = {UNAUTHORIZED: {"WWW-Authenticate": "Bearer"}, TOO_MANY: LATER, UNAVAILABLE: LATER}
"""Of refusals with these statuses."""


def make_app(options: FrontEndOptions) -> web.Application:
    """Raises when the tokenizer or the chat template cannot be used. Must be called inside an event loop."""
    model, triton, metrics = ServedModel(options), TritonModel(options.url, options.model_name), Metrics()
    handlers = Handlers(model, triton, metrics)
    operations = Operations(options, model, triton, metrics)
    middlewares = [_accounting(metrics), _authorization(Keys(options.api_keys)), _admission(options.max_requests)]
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.get("/", operations.page),
            web.get("/health", operations.ready),
            web.get("/health/ready", operations.ready),
            web.get("/health/live", operations.live),
            web.get("/metrics", operations.metrics),
            web.get("/v1/models", operations.models),
            web.get("/v1/models/{name:.+}", operations.model),
            web.post("/v1/completions", handlers.completions),
            web.post("/v1/chat/completions", handlers.chat),
        ]
    )
    app.cleanup_ctx.append(operations.connections)
    app.on_response_prepare.append(_name_response)
    return app


class Operations:
    """Everything but answers."""

    def __init__(self, options: FrontEndOptions, model: ServedModel, triton: TritonModel, metrics: Metrics) -> None:
        self._options, self._model, self._triton, self._metrics = options, model, triton, metrics
        self._page, self._policy = load_page()
        self._created = int(time.time())
        self._session: aiohttp.ClientSession | None = None

    async def connections(self, app: web.Application) -> AsyncIterator[None]:
        """What is open while the application runs."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=METRICS_TIMEOUT_S)) as self._session:
            yield
        await self._triton.close()
        self._model.prompts.close()

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", headers=self._policy)

    async def live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def ready(self, request: web.Request) -> web.Response:
        if await self._triton.is_ready():
            return web.json_response({"status": "ready"})
        raise ApiError(
            f"model {self._triton.name!r} is not ready in the Triton server at {self._triton.url}", status=UNAVAILABLE
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """The front end's own numbers, then Triton's as they are."""
        return web.Response(text=self._metrics.text() + await self._triton_metrics(), content_type="text/plain")

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [await self._card()]})

    async def model(self, request: web.Request) -> web.Response:
        self._model.check_name(request.match_info["name"])
        return web.json_response(await self._card())

    async def _card(self) -> dict[str, object]:
        engines_limit = None
        with contextlib.suppress(ApiError):  # the server is away: its model is still the one that is served here
            engines_limit = await self._triton.max_length()
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "pt-trtllm",
            "max_model_len": self._model.context(engines_limit),
            "has_chat_template": self._model.template.is_own,
        }

    async def _triton_metrics(self) -> str:
        assert self._session is not None
        url = self._options.triton_metrics_url
        try:
            async with self._session.get(url) as response:
                response.raise_for_status()
                return await response.text()
        except (aiohttp.ClientError, asyncio.TimeoutError, UnicodeDecodeError) as error:
            return f"# Triton's metrics are missing: {url}: {' '.join(str(error).split()) or type(error).__name__}\n"


def _accounting(metrics: Metrics) -> Middleware:
    """Gives every request an id, every error OpenAI's form, and every end its line and its count."""

    @web.middleware
    async def account(request: web.Request, handler: Handler) -> web.StreamResponse:
        given, started, status = request.headers.get("X-Request-Id", ""), time.monotonic(), CLIENT_LEFT
        request_id = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        request[REQUEST_ID] = request_id
        metrics.in_flight += request.path not in QUIET
        try:
            try:
                response = await handler(request)
            except ConnectionResetError:
                raise  # the client has left
            except web.HTTPException as error:
                message = f"{request.method} {request.path}: {error.reason}"
                response = _refusal(request, ApiError(message, status=error.status))
            except Exception as error:
                response = _refusal(request, error)
            status = response.status
            return response
        finally:
            if request.path not in QUIET:
                metrics.in_flight -= 1
                metrics.requests[status] += 1
                log_request(request, request_id, status, started)

    return account


def _authorization(keys: Keys) -> Middleware:
    """Before anything of a request but its head is read."""

    @web.middleware
    async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
        if keys and request.path not in OPEN:
            given = request.headers.get("Authorization", "")
            if not keys.accept(given):
                says = "Incorrect API key provided" if given else "You didn't provide an API key"
                raise ApiError(
                    f"{says}; this server wants the header 'Authorization: Bearer KEY' with a key of its own",
                    status=UNAUTHORIZED, code="invalid_api_key",
                )  # fmt: skip
        return await handler(request)

    return authorize


def _admission(max_requests: int) -> Middleware:
    """Answers so many requests at a time and refuses the others, before they take memory."""
    answering = 0

    @web.middleware
    async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal answering
        if request.method != "POST":
            return await handler(request)
        if answering >= max_requests:
            raise ApiError(
                f"{answering} requests are being answered, which is all that this server takes; try again later",
                status=TOO_MANY, code="queue_full",
            )  # fmt: skip
        answering += 1
        try:
            return await handler(request)
        finally:
            answering -= 1

    return admit


async def _name_response(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")


def _refusal(request: web.Request, error: Exception) -> web.Response:
    told = refusal_of(request, error)
    return web.json_response(told.body(), status=told.status, headers=HEADERS.get(told.status))
