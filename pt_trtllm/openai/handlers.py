"""Answering one request: parse, ask Triton, reply whole or as server-sent events."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from pt_trtllm.openai.answers import Ask, Delta, answer_all
from pt_trtllm.openai.errors import ApiError
from pt_trtllm.openai.log import describe, refusal_of
from pt_trtllm.openai.metrics import Metrics, Stopwatch
from pt_trtllm.openai.model import ServedModel
from pt_trtllm.openai.replies import ChatReply, CompletionReply, Reply, usage_of
from pt_trtllm.openai.requests import Chat, Completion, parse_chat, parse_completion
from pt_trtllm.openai.triton import TritonModel

EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
"""Proxies must not collect events."""


class Handlers:
    def __init__(self, model: ServedModel, triton: TritonModel, metrics: Metrics) -> None:
        self._model, self._triton, self._metrics = model, triton, metrics

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_completion(await read_json(request)))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_chat(await read_json(request)))

    async def _answer(self, request: web.Request, question: Completion | Chat) -> web.StreamResponse:
        self._model.check_name(question.model)
        watch = Stopwatch(self._metrics)
        prompts = self._model.prompts_of(question)
        prefix = "chatcmpl-" if isinstance(question, Chat) else "cmpl-"
        name, request_id = self._model.name, prefix + uuid.uuid4().hex
        asks = await self._model.asks(question, prompts, self._triton, request_id)
        reply: Reply
        if isinstance(question, Chat):
            reply = ChatReply(request_id, name, question, self._model.tokenizer)
        else:
            reply = CompletionReply(request_id, name, question, self._model.tokenizer, asks)
        self._metrics.prompt_tokens += sum(map(len, prompts))
        describe(request, answer_id=request_id, prompt_tokens=sum(map(len, prompts)), stream=question.stream)
        async with aclosing(self._deltas(request, asks, watch)) as deltas:
            if question.stream:
                return await _stream(request, reply, deltas, prompts)
            return await _whole(reply, deltas, prompts, len(asks))

    async def _deltas(self, request: web.Request, asks: Sequence[Ask], watch: Stopwatch) -> AsyncGenerator[Delta]:
        """Every answer's pieces, counted on their way."""
        count = 0
        try:
            async with aclosing(answer_all(self._triton, self._model.tokenizer, asks)) as deltas:
                async for delta in deltas:
                    if delta.num_tokens:
                        watch.token(delta.num_tokens)
                        count += delta.num_tokens
                    yield delta
            watch.finish(len(asks))
        finally:
            describe(request, tokens=count)


async def read_json(request: web.Request) -> Any:
    # Pages of other sites can post anything but this type without asking the browser's permission first.
    if request.content_type != "application/json":
        raise ApiError(f"Content-Type is {request.content_type}, expected application/json", status=415)
    try:
        return json.loads(await request.text())
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from None


async def _whole(
    reply: Reply, deltas: AsyncIterator[Delta], prompts: Sequence[Sequence[int]], num_answers: int
) -> web.Response:
    collected: list[list[Delta]] = [[] for _ in range(num_answers)]
    async for delta in deltas:
        collected[delta.index].append(delta)
    num_tokens = sum(delta.num_tokens for own in collected for delta in own)
    return web.json_response(reply.whole(collected, usage_of(prompts, num_tokens)))


async def _stream(
    request: web.Request, reply: Reply, deltas: AsyncIterator[Delta], prompts: Sequence[Sequence[int]]
) -> web.StreamResponse:
    """An error before the first piece is an ordinary HTTP error; one after it is the stream's last event."""
    first = await anext(deltas)
    choice, num_tokens = reply.growth(first), first.num_tokens
    response = web.StreamResponse(headers=EVENT_STREAM)
    await response.prepare(request)
    try:
        if opening := reply.opening():
            await _send(response, reply.chunk(opening))
        await _send(response, reply.chunk([choice]))
        async for delta in deltas:
            num_tokens += delta.num_tokens
            choice = reply.growth(delta)
            if delta.text or delta.finish_reason or choice["logprobs"]:
                await _send(response, reply.chunk([choice]))
        if reply.question.include_usage:
            await _send(response, reply.chunk([], usage_of(prompts, num_tokens)))
    except ConnectionResetError:
        raise  # the client has left
    except Exception as error:
        await _send(response, refusal_of(request, error).body())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
