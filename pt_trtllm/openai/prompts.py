"""From what clients send to token ids: in threads beside the event loop, and never more than the model could take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pt_trtllm.errors import ConfigError
from pt_trtllm.openai.chat_template import ChatTemplate
from pt_trtllm.openai.errors import ApiError
from pt_trtllm.openai.requests import Chat, Completion
from pt_trtllm.runtime.tokenizer import CHUNK, USUAL_CHARACTERS, Tokenizer

NUM_THREADS = 4
MAX_PROMPT_TOKENS = 1 << 20
"""Of all prompts of one request together, unless the model's context alone is longer."""


class Prompts:
    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._longest = max(tokenizer.longest_piece, 1)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="pt-trtllm-prompts")

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    async def of(self, question: Completion | Chat, context: int | None) -> list[tuple[int, ...]]:
        """Raises for what cannot fit into a context of so many tokens, long texts before they are tokenized."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, question, context)

    def _encode(self, question: Completion | Chat, context: int | None) -> list[tuple[int, ...]]:
        """A template writes the special tokens itself, so that none is added to its text."""
        limit = context or MAX_PROMPT_TOKENS
        all_limit = max(limit, MAX_PROMPT_TOKENS)
        prompts: Sequence[str | tuple[int, ...]]
        if isinstance(question, Chat):
            self._check_length(sum(len(message["content"]) for message in question.messages), limit, "messages")
            what, prompts = "messages", [self._template.render(question.messages, question.template_variables)]
        else:
            what, prompts = "prompt", question.prompts
        if len(prompts) > 1 and sum(map(len, prompts)) > all_limit * self._longest:
            raise _too_many(all_limit, what)
        found: list[tuple[int, ...]] = []
        total = 0
        for prompt in prompts:
            ids = self._ids(prompt, limit, what) if isinstance(prompt, str) else prompt
            if not ids or not all(0 <= token < 1 << 31 for token in ids):
                raise ApiError("a prompt is empty or has token ids outside the vocabulary", param="prompt")
            total += len(ids)
            if len(prompts) > 1 and total > all_limit:
                raise _too_many(all_limit, what)
            found.append(ids)
        return found

    def _ids(self, text: str, limit: int, what: str) -> tuple[int, ...]:
        self._check_length(len(text), limit, what)
        special = what == "prompt"
        try:
            if len(text) > max(CHUNK, USUAL_CHARACTERS * limit) and self._tokenizer.has_more_tokens(text, limit):
                raise too_long(f"{limit} tokens. However, {what} of more than that were given", what)
            return tuple(self._tokenizer.encode_in_thread(text, add_special_tokens=special))
        except ConfigError as error:
            raise ApiError(str(error), param=what) from None

    def _check_length(self, length: int, limit: int, what: str) -> None:
        if length > limit * self._longest:
            raise too_long(
                f"{limit} tokens of at most {self._longest} characters. However, {what} of {length} characters were "
                "given",
                what,
            )


def _too_many(limit: int, what: str) -> ApiError:
    return ApiError(f"the prompts have more than {limit} tokens together; send them in several requests", param=what)


def check_context(num_prompt: int, num_output: int, context: int | None, what: str) -> None:
    """Prompt and answer must fit together, as OpenAI's and vLLM's servers have it."""
    if context is not None and num_prompt + num_output > context:
        raise too_long(
            f"{context} tokens. However, you requested {num_prompt + num_output} tokens ({num_prompt} in the {what}, "
            f"{num_output} in the completion)",
            f"{what} or completion",
            param=what,
        )


def too_long(says: str, what: str, param: str | None = None) -> ApiError:
    return ApiError(
        f"This model's maximum context length is {says}. Please reduce the length of the {what}.",
        param=param or what,
        code="context_length_exceeded",
    )
