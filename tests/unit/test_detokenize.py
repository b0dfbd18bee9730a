"""Incremental text equals the text of the whole, whatever the tokens; stop strings end it wherever they fall."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from pt_trtllm.runtime.detokenize import AnswerText, Detokenizer
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

BYTE_LEVEL = Tokenizer(Path(__file__).parents[2] / "examples/tiny-pt")
VOCAB_SIZE = 2048
BYTES = [BYTE_LEVEL.encode(chr(c), add_special_tokens=False) for c in (0xE9, 0x20AC, 0x1F600, 0x4E2D)]
BROKEN = sorted({token for row in BYTES for token in row})
"""Tokens that are pieces of characters."""


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2 and Gemma spell text: blanks as a mark, the first of them dropped, unknown characters as bytes."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁", "▁the", "é"]
    backend = Backend(models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def check_grows_to_the_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer, text, whole = Detokenizer(tokenizer), "", tokenizer.decode(ids)
    for token in ids:
        text += detokenizer.add(token)
        assert whole.startswith(text)
    assert text + detokenizer.finish() == whole


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(st.integers(0, VOCAB_SIZE + 5), st.sampled_from(BROKEN), st.integers(3, 258)), min_size=0, max_size=80
    )
)
def test_pieces_of_random_tokens_join_to_the_whole(ids: list[int]) -> None:
    check_grows_to_the_whole(BYTE_LEVEL, ids)


@settings(max_examples=200)
@given(ids=st.lists(st.one_of(st.integers(0, 261), st.integers(257, 261)), max_size=60))
def test_pieces_of_byte_fallback_tokens_join_to_the_whole(byte_fallback: Tokenizer, ids: list[int]) -> None:
    check_grows_to_the_whole(byte_fallback, ids)


@settings(max_examples=100)
@given(st.text(max_size=60))
def test_characters_come_whole(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    pieces = pieces_of(BYTE_LEVEL, ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_most_text_comes_at_once() -> None:
    ids = BYTE_LEVEL.encode("The quick brown fox, he said.", add_special_tokens=False)
    assert pieces_of(BYTE_LEVEL, ids) == [BYTE_LEVEL.decode([token]) for token in ids] + [""]


@pytest.mark.parametrize("pool", [list(range(VOCAB_SIZE)), BROKEN, list(range(130, 258))])
def test_the_work_per_token_is_bounded(pool: list[int]) -> None:
    class Counting(Tokenizer):
        decoded = 0

        def decode(self, ids: list[int]) -> str:  # type: ignore[override]
            Counting.decoded += len(ids)
            return super().decode(ids)

    rng = random.Random(3)
    pieces_of(Counting(Path(__file__).parents[2] / "examples/tiny-pt"), [rng.choice(pool) for _ in range(3000)])
    assert Counting.decoded < 3000 * 30


def cut(text: str, stops: list[str], include: bool) -> str:
    """Plainly: the text up to where the first stop string is complete, cut at the earliest one that ends there."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end] if include else text[: end - max(map(len, found))]
    return text


@settings(max_examples=300)
@given(
    text=st.text("ab é€", max_size=40),
    stops=st.lists(st.text("ab é€", min_size=1, max_size=5), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_are_found_across_tokens(text: str, stops: list[str], include: bool) -> None:
    # one token per byte or so: every stop string crosses tokens, and no two can be complete at the same one
    ids = [token for char in text for token in BYTE_LEVEL.encode(char, add_special_tokens=False)]
    answer = AnswerText(BYTE_LEVEL, tuple(stops), include_stop=include)
    seen = [""]
    stopped = False
    for token in ids:
        stopped = answer.add(token)
        seen.append(answer.visible)
        if stopped:
            break
    stopped = answer.finish() or stopped
    expected = cut(text, stops, include)
    assert answer.visible == expected
    assert stopped == any(stop in text for stop in stops)
    for earlier, later in zip(seen, [*seen[1:], expected], strict=True):
        assert later.startswith(earlier)


def test_a_token_that_holds_more_than_the_stop_string_is_cut() -> None:
    ids = BYTE_LEVEL.encode("I said that", add_special_tokens=False)
    word = BYTE_LEVEL.decode(ids[1:2])
    assert len(word) > 2
    for include in (False, True):
        answer = AnswerText(BYTE_LEVEL, (word[1:-1],), include_stop=include)
        assert [answer.add(token) for token in ids[:2]] == [False, True]
        assert answer.visible == "I" + word[: -1 if include else 1]
        assert not answer.add(ids[2])


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = [token for char in "abab" for token in BYTE_LEVEL.encode(char, add_special_tokens=False)]
    answer = AnswerText(BYTE_LEVEL, ("b",), min_tokens=2)
    assert [answer.add(token) for token in ids] == [False, False, False, True]
    assert answer.visible == "aba"


def test_a_stop_string_that_only_the_end_completes_is_found(byte_fallback: Tokenizer) -> None:
    answer = AnswerText(byte_fallback, ("!",))
    assert [answer.add(token) for token in (258, 1 + ord("!"))] == [False, False]
    assert answer.finish()
    assert answer.visible == "b"


def test_an_answer_keeps_the_blank_between_prompt_and_first_word(byte_fallback: Tokenizer) -> None:
    prompt = [257, 258]  # "a" (its blank is dropped at the beginning of a text), "b"
    answer = AnswerText(byte_fallback, prompt_ids=prompt)
    answer.add(260)
    answer.finish()
    assert answer.visible == " the"
    assert byte_fallback.decode(prompt) + answer.visible == byte_fallback.decode([*prompt, 260]) == "ab the"


@settings(max_examples=100)
@given(st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=12), st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=30))
def test_prompt_and_answer_join_to_the_whole(prompt: list[int], ids: list[int]) -> None:
    before, whole = BYTE_LEVEL.decode(prompt), BYTE_LEVEL.decode([*prompt, *ids])
    answer = AnswerText(BYTE_LEVEL, prompt_ids=prompt)
    for token in ids:
        answer.add(token)
    answer.finish()
    if not before.endswith("\ufffd"):  # otherwise the first character belongs to both
        assert before + answer.visible == whole
