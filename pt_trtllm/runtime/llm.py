"""The Python API: `LLM(engine_dir).generate(prompts, SamplingParams(...))`, as in vLLM and TensorRT-LLM."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.stream import AsyncStream, Stream
from pt_trtllm.runtime.tokenizer import Tokenizer, find_tokenizer
from pt_trtllm.runtime.world import World

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "make_request"]

DEFAULT_PRIORITY = Request.priority
Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]


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
        tokenizer_dir = Path(tokenizer_dir) if tokenizer_dir else None
        self.tokenizer = find_tokenizer(engine_dir, tokenizer_dir)
        self._world = World(engine_dir, options, Path(hostfile) if hostfile else None, tokenizer_dir)
        self.config = self._world.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_logits: bool = False,
        priority: float = DEFAULT_PRIORITY,
        progress: Progress = lambda done, total: None,
    ) -> list[RequestOutput]:
        """Answers one prompt or many (text or token ids), all at once; results are in the order of the prompts.

        One SamplingParams serves all prompts; a list has one for each.
        """
        many = _as_list(prompts)
        params = _params_for(many, sampling_params)
        requests = [
            self._request(prompt, own, f"prompt {index}", prompt_logits, priority)
            for index, (prompt, own) in enumerate(zip(many, params, strict=True))
        ]
        streams = [
            Stream(_text(prompt), request, self.tokenizer) for prompt, request in zip(many, requests, strict=True)
        ]
        try:
            self._submit(streams)
            results = []
            for done, stream in enumerate(streams):
                progress(done, len(streams))
                while not stream.finished:
                    stream.take(stream.events.get())
                results.append(stream.output(self._world.folder))
        except BaseException:
            for stream in streams:
                stream.cancel(self._world)
            raise
        progress(len(streams), len(streams))
        return results

    async def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: float = DEFAULT_PRIORITY,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the growing answer, once per new token; leaving the loop early cancels the request."""
        request = self._request(prompt, sampling_params or SamplingParams(), "prompt", False, priority)
        stream = AsyncStream(_text(prompt), request, self.tokenizer)
        self._submit([stream])
        try:
            while not stream.finished:
                stream.take(await stream.inbox.get())
                yield stream.output(self._world.folder)
        finally:
            stream.cancel(self._world)

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

    def _submit(self, streams: Sequence[Stream]) -> None:
        samples = [sample for stream in streams for sample in stream.samples]
        ids = self._world.submit([(sample.request, sample) for sample in samples])
        for sample, request_id in zip(samples, ids, strict=True):
            sample.id = request_id

    def _request(
        self, prompt: Prompt, params: SamplingParams, label: str, prompt_logits: bool, priority: float
    ) -> Request:
        request = make_request(prompt, params, self.tokenizer, label, prompt_logits=prompt_logits)
        request = dataclasses.replace(request, priority=priority)
        request.check(self.config, label)
        return request


def make_request(
    prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None, label: str, *, prompt_logits: bool = False
) -> Request:
    """With texts as tokens. Raises when that takes a tokenizer and there is none."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("this engine came without a tokenizer: give tokenizer_dir, or prompts as token ids")
        prompt = tokenizer.encode(prompt)
    request = Request(prompt_ids=tuple(prompt), params=params, context_logits=prompt_logits)
    return request.with_token_bans(tokenizer, label)


def _text(prompt: Prompt) -> str | None:
    return prompt if isinstance(prompt, str) else None


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
