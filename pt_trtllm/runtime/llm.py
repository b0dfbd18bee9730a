"""The Python API: `LLM(engine_dir).generate(prompts, SamplingParams(...))`, as in vLLM and TensorRT-LLM."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.protocol import logits_file, read_logits
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer, find_tokenizer
from pt_trtllm.runtime.world import World

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    token_ids: tuple[int, ...]
    """The answer without the prompt; the end token is part of it."""
    text: str | None
    """None without a tokenizer."""
    finish_reason: str | None
    """"stop", "length" or "cancelled"; None while the answer is still growing."""


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logits: torch.Tensor | None = field(default=None, repr=False)
    """float32 [prompt tokens, vocabulary], when it was asked for."""

    @property
    def finished(self) -> bool:
        return all(output.finish_reason for output in self.outputs)


class LLM:
    """An engine that is running, over as many MPI ranks as it was built for. Close it, or use it in a `with` block.

    Many threads and coroutines may ask at the same time; their requests share the engine's batches.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        tokenizer_dir: str | Path | None = None,
        hostfile: str | Path | None = None,
        options: RuntimeOptions | None = None,
    ) -> None:
        engine_dir = Path(engine_dir)
        self.tokenizer = find_tokenizer(engine_dir, Path(tokenizer_dir) if tokenizer_dir else None)
        self._world = World(engine_dir, options, Path(hostfile) if hostfile else None)
        self.config = self._world.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_logits: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> list[RequestOutput]:
        """Answers one prompt or many (text or token ids), all at once; results are in the order of the prompts.

        One SamplingParams serves all prompts; a list has one for each.
        """
        many = _as_list(prompts)
        params = _params_for(many, sampling_params)
        requests = [
            self._request(prompt, own, prompt_logits, f"prompt {index}")
            for index, (prompt, own) in enumerate(zip(many, params, strict=True))
        ]
        streams = [_Stream(self, prompt, request) for prompt, request in zip(many, requests, strict=True)]
        try:
            self._submit(streams)
            results = []
            for done, stream in enumerate(streams):
                progress(done, len(streams))
                while not stream.finished:
                    stream.take(stream.events.get())
                results.append(stream.output())
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        progress(len(streams), len(streams))
        return results

    async def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yields the growing answer, once per new token; leaving the loop early cancels the request."""
        request = self._request(prompt, sampling_params or SamplingParams(), False, "prompt")
        stream = _AsyncStream(self, prompt, request)
        self._submit([stream])
        try:
            while not stream.finished:
                stream.take(await stream.inbox.get())
                yield stream.output()
        finally:
            stream.cancel()

    def stats(self) -> dict[str, Any]:
        """What the engine did since it started: passes, counted collectives, cache use, times."""
        return self._world.stats()

    def close(self) -> None:
        """Ends the engine's processes."""
        self._world.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(self, streams: Sequence[_Stream]) -> None:
        ids = self._world.submit([(stream.request, stream.events) for stream in streams])
        for stream, request_id in zip(streams, ids, strict=True):
            stream.id = request_id

    def _request(self, prompt: Prompt, params: SamplingParams, prompt_logits: bool, label: str) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("this engine came without a tokenizer: give tokenizer_dir, or prompts as token ids")
            prompt = self.tokenizer.encode(prompt)
        request = Request(prompt_ids=tuple(prompt), params=params, context_logits=prompt_logits)
        request.check(self.config, label)
        return request


class _Stream:
    """One request on its way: what it was, and what has come of it."""

    def __init__(self, llm: LLM, prompt: Prompt, request: Request) -> None:
        self._llm, self.request = llm, request
        self._text = prompt if isinstance(prompt, str) else None
        self._ids: list[int] = []
        self.id: int | None = None
        self._finish_reason: str | None = None
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def take(self, event: Any) -> None:
        if isinstance(event, BaseException):
            self._finish_reason = "error"
            raise event
        _, tokens, self._finish_reason = event
        self._ids += tokens

    def output(self) -> RequestOutput:
        tokenizer: Tokenizer | None = self._llm.tokenizer
        completion = CompletionOutput(
            token_ids=tuple(self._ids),
            text=tokenizer.decode(self._ids) if tokenizer else None,
            finish_reason=self._finish_reason,
        )
        logits = None
        if self.finished and self.request.context_logits and self.id is not None:
            path = logits_file(self._llm._world.folder, self.id)
            logits = read_logits(path)
            path.unlink()
        return RequestOutput(
            prompt=self._text, prompt_token_ids=self.request.prompt_ids, outputs=(completion,), prompt_logits=logits
        )

    def cancel(self) -> None:
        if self.id is not None and not self.finished:
            self._finish_reason = "cancelled"
            self._llm._world.cancel(self.id)


class _AsyncStream(_Stream):
    """Hands events over to the event loop that asked."""

    def __init__(self, llm: LLM, prompt: Prompt, request: Request) -> None:
        super().__init__(llm, prompt, request)
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.events = _Forward(asyncio.get_running_loop(), self.inbox)  # type: ignore[assignment]  # only `put` is used


class _Forward:
    """What the world's reader thread puts here arrives in an asyncio queue."""

    def __init__(self, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any]) -> None:
        self._loop, self._inbox = loop, inbox

    def put(self, event: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, event)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(token, int) for token in prompts):
        return [[token for token in prompts if isinstance(token, int)]]
    return [prompt for prompt in prompts if not isinstance(prompt, int)]


def _params_for(
    prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts and {len(params)} sampling params; give one for all, or one for each"
        )
    return list(params)
