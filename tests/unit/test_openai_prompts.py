"""Prompts that are too long are refused before they cost anything, and none stops the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm.openai.chat_template import load_chat_template
from pt_trtllm.openai.errors import ApiError
from pt_trtllm.openai.prompts import CHUNK, MAX_PROMPT_TOKENS, Prompts, check_context
from pt_trtllm.openai.requests import parse_chat, parse_completion
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
TOO_LONG = "context_length_exceeded"


class CountingTokenizer(Tokenizer):
    """Notes how long the texts are that it is given."""

    def __init__(self) -> None:
        super().__init__(EXAMPLE)
        self.lengths: list[int] = []

    def encode_in_thread(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.lengths.append(len(text))
        return super().encode_in_thread(text, add_special_tokens=add_special_tokens)


TOKENIZER = CountingTokenizer()
PROMPTS = Prompts(TOKENIZER, load_chat_template(EXAMPLE))


def completion(prompt: Any) -> Any:
    return parse_completion({"prompt": prompt})


def chat(text: str) -> Any:
    return parse_chat({"messages": [{"role": "user", "content": text}]})


def ids_of(question: Any, context: int | None) -> list[tuple[int, ...]]:
    TOKENIZER.lengths.clear()
    return asyncio.run(PROMPTS.of(question, context))


def test_prompts_become_the_ids_of_the_tokenizer() -> None:
    texts = ["It is a truth", "", "Größe 雪 \U0001f642", "word " * 40_000]
    assert ids_of(completion(texts), None) == [tuple(TOKENIZER.encode(text)) for text in texts]
    assert ids_of(completion([5, 6]), 10) == [(5, 6)]
    rendered = "<|bos|>User: Hi\n\nAssistant:"
    assert ids_of(chat("Hi"), 100) == [tuple(TOKENIZER.encode(rendered, add_special_tokens=False))]


@pytest.mark.parametrize("question", [completion, chat])
def test_a_text_of_more_characters_than_fit_is_never_tokenized(question: Callable[[str], Any]) -> None:
    with pytest.raises(ApiError, match="maximum context length is 512 tokens") as caught:
        ids_of(question("It is a truth " * 10**6), 512)
    assert (caught.value.status, caught.value.code) == (400, TOO_LONG)
    assert TOKENIZER.lengths == []


def test_a_long_text_is_counted_in_chunks_up_to_the_limit() -> None:
    context = 40_000
    text = ("a b " * context * 2)[: context * 8]
    with pytest.raises(ApiError, match=f"maximum context length is {context} tokens") as caught:
        ids_of(completion(text), context)
    assert caught.value.code == TOO_LONG
    assert set(TOKENIZER.lengths) == {CHUNK}
    assert sum(TOKENIZER.lengths) < len(text) / 2


def test_a_long_text_of_few_tokens_fits() -> None:
    text = " something" * 30_000
    assert len(text) > max(CHUNK, 4 * 40_000)
    (ids,) = ids_of(completion(text), 40_000)
    assert ids == tuple(TOKENIZER.encode(text))


def test_all_prompts_of_a_request_have_a_limit_together() -> None:
    many = completion([[7] * 10_000] * (MAX_PROMPT_TOKENS // 10_000 + 1))
    with pytest.raises(ApiError, match="the prompts have more than 1048576 tokens together"):
        ids_of(many, 20_000)
    with pytest.raises(ApiError, match="the prompts have more than 1048576 tokens together"):
        ids_of(completion(["x" * (1 << 22)] * 10), None)
    assert TOKENIZER.lengths == []


def test_prompt_and_answer_must_fit_together() -> None:
    check_context(500, 12, 512, "prompt")
    check_context(10**9, 10**9, None, "prompt")
    with pytest.raises(ApiError) as caught:
        check_context(500, 13, 512, "messages")
    assert str(caught.value) == (
        "This model's maximum context length is 512 tokens. However, you requested 513 tokens (500 in the messages, "
        "13 in the completion). Please reduce the length of the messages or completion."
    )
    assert (caught.value.code, caught.value.param) == (TOO_LONG, "messages")


def test_others_run_while_a_text_is_tokenized() -> None:
    """In the midst of it, not only before and behind."""
    times: list[float] = []
    ticks: list[float] = []

    def encode() -> None:
        times.append(time.monotonic())
        TOKENIZER.encode_in_thread("It is a truth universally acknowledged " * 40_000)
        times.append(time.monotonic())

    worker = threading.Thread(target=encode)
    worker.start()
    while worker.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.001)
    third = (times[1] - times[0]) / 3
    assert any(times[0] + third < tick < times[1] - third for tick in ticks)
