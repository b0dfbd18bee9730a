"""Answers in the two forms that OpenAI has: one per endpoint, each whole or in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pt_trtllm.openai.answers import Ask, Delta
from pt_trtllm.openai.errors import ApiError
from pt_trtllm.openai.logprobs import Offsets, TokenLogprob, chat_logprobs, completion_logprobs
from pt_trtllm.openai.requests import Chat, Completion, Question
from pt_trtllm.openai.token_text import TokenText


class Reply(ABC):
    kind: str
    chunk_kind: str

    def __init__(self, request_id: str, model: str, question: Question, texts: TokenText) -> None:
        self.question, self._texts = question, texts
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._usage_field = {"usage": None} if question.include_usage else {}
        """In every chunk, so that clients can tell that the numbers are still to come."""

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        last = self._usage_field if usage is None else {"usage": usage}
        return {**self._head, "object": self.chunk_kind, "choices": choices, **last}

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: dict[str, Any]) -> dict[str, Any]:
        """`deltas`: of each answer."""
        choices = [self.choice(joined(own)) for own in deltas]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """Choices of the chunk before the first text, if there is one."""
        return []

    @abstractmethod
    def choice(self, answer: Delta) -> dict[str, Any]:
        """A finished answer."""

    @abstractmethod
    def growth(self, delta: Delta) -> dict[str, Any]:
        """What has been added to an answer."""


class CompletionReply(Reply):
    kind = chunk_kind = "text_completion"
    question: Completion

    def __init__(self, request_id: str, model: str, question: Completion, texts: TokenText, asks: Sequence[Ask]):
        super().__init__(request_id, model, question, texts)
        self._prompt_ids = [ask.prompt_ids for ask in asks]
        self._has_prompt = [not question.echo] * len(asks)
        """Whether each choice's prompt was sent, where it shall be."""
        self._offsets = [Offsets(texts) for _ in asks]

    def choice(self, answer: Delta) -> dict[str, Any]:
        return self.growth(answer)

    def growth(self, delta: Delta) -> dict[str, Any]:
        index, question = delta.index, self.question
        text, rows = (delta.text, delta.rows) if question.max_tokens != 0 else ("", ())
        if not self._has_prompt[index]:
            self._has_prompt[index] = True
            text = self._prompt_text(index) + text
            if question.logprobs is not None:
                rows = (*self._prompt_rows(index, delta), *rows)
        logprobs = None
        if question.logprobs is not None and rows:
            logprobs = completion_logprobs(rows, self._texts, self._offsets[index])
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _prompt_rows(self, index: int, delta: Delta) -> tuple[TokenLogprob, ...]:
        first, *others = self._prompt_ids[index]
        if len(delta.prompt_rows) != len(others):
            raise ApiError(
                "echo with logprobs is not supported: the server's model sends no context_logits", param="echo"
            )
        return (TokenLogprob(first, None), *delta.prompt_rows)

    def _prompt_text(self, index: int) -> str:
        prompt = self.question.prompts[index // self.question.n]
        return prompt if isinstance(prompt, str) else self._texts.tokenizer.decode(prompt)


class ChatReply(Reply):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    question: Chat

    def opening(self) -> list[dict[str, Any]]:
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{"index": index, **start} for index in range(self.question.n)]

    def choice(self, answer: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": answer.index, "message": message, **self._end(answer)}

    def growth(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return {"index": delta.index, "delta": content, **self._end(delta)}

    def _end(self, delta: Delta) -> dict[str, Any]:
        wanted = self.question.logprobs is not None and (delta.rows or delta.text)
        logprobs = chat_logprobs(delta.rows, self._texts) if wanted else None
        return {"logprobs": logprobs, "finish_reason": delta.finish_reason}


def joined(deltas: Sequence[Delta]) -> Delta:
    """An answer's pieces as one."""
    return Delta(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        rows=tuple(row for delta in deltas for row in delta.rows),
        prompt_rows=tuple(row for delta in deltas for row in delta.prompt_rows),
        num_tokens=sum(delta.num_tokens for delta in deltas),
        finish_reason=deltas[-1].finish_reason,
    )


def usage_of(prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, Any]:
    prompt_tokens = sum(map(len, prompts))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": prompt_tokens + num_tokens,
    }
