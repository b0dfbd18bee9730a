"""Answering one request: parse, ask Triton, reply whole or as server-sent events."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from pt_trtllm.openai.answers import Ask, Delta
from pt_trtllm.openai.body import Bodies
from pt_trtllm.openai.fan_out import FanOut
from pt_trtllm.openai.log import describe, refusal_of
from pt_trtllm.openai.metrics import Metrics, Stopwatch
from pt_trtllm.openai.model import ServedModel
from pt_trtllm.openai.replies import ChatReply, CompletionReply, Reply, usage_of
from pt_trtllm.openai.requests import Chat, Completion, parse_chat, parse_completion
from pt_trtllm.openai.triton import TritonModel

EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
"""Proxies must not collect events."""
SEND_TIMEOUT_S = 60.0
"""For one event to be taken."""


class Handlers:
    def __init__(self, model: ServedModel, triton: TritonModel, metrics: Metrics) -> None:
        self._model, self._triton, self._metrics = model, triton, metrics
        self._bodies, self._fan_out = Bodies(), FanOut(triton, model.tokenizer)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_completion)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_chat)

    async def _answer(self, request: web.Request, parse: Callable[[Any], Completion | Chat]) -> web.StreamResponse:
        watch = Stopwatch(self._metrics)
        async with self._bodies.parsed(request, parse) as question:
            self._model.check_name(question.model)
            context = self._model.context(await self._triton.max_length())
            prompts = await self._model.prompts.of(question, context)
            if isinstance(question, Chat):  # all that a client may have sent with them is of no use any more
                question = dataclasses.replace(question, messages=(), template_variables={})
        prefix = "chatcmpl-" if isinstance(question, Chat) else "cmpl-"
        name, request_id = self._model.name, prefix + uuid.uuid4().hex
        asks = await self._model.asks(question, prompts, self._triton, request_id)
        reply: Reply
        if isinstance(question, Chat):
            reply = ChatReply(request_id, name, question, self._model.texts)
        else:
            reply = CompletionReply(request_id, name, question, self._model.texts, asks)
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
            async with aclosing(self._fan_out.answers(asks)) as deltas:
                async for delta in deltas:
                    if delta.num_tokens:
                        watch.token(delta.num_tokens)
                        count += delta.num_tokens
                    yield delta
            watch.finish(len(asks))
        finally:
            describe(request, tokens=count)


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

    async def send(event: dict[str, Any] | str) -> None:
        """A client that has stopped to read must not hold its streams for ever."""
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        late = asyncio.get_running_loop().call_later(SEND_TIMEOUT_S, _disconnect, request)
        try:
            await response.write(f"data: {data}\n\n".encode())
        finally:
            late.cancel()

    try:
        if opening := reply.opening():
            await send(reply.chunk(opening))
        await send(reply.chunk([choice]))
        async for delta in deltas:
            num_tokens += delta.num_tokens
            choice = reply.growth(delta)
            if delta.text or delta.finish_reason or choice["logprobs"]:
                await send(reply.chunk([choice]))
        if reply.question.include_usage:
            await send(reply.chunk([], usage_of(prompts, num_tokens)))
    except ConnectionResetError:
        raise  # the client has left
    except Exception as error:
        await send(refusal_of(request, error).body())
    await send("[DONE]")
    await response.write_eof()
    return response


def _disconnect(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
