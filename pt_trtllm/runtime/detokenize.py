"""From a growing list of tokens to text that never has to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.stop_strings import StopStrings
from pt_trtllm.runtime.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
KEEP_TOKENS = 8
"""Tokens that stay in the window as context: whatever they lack on their left shows in their first characters only."""
MAX_WINDOW = 3 * KEEP_TOKENS
MAX_RAGGED = 4
"""Characters at a window's beginning that may differ from the whole: an unfinished UTF-8 sequence has up to three
bytes left, and decoders treat the first token's blank or continuation mark in their own ways."""


class Detokenizer:
    """Gives the text of an answer piece by piece; the pieces join to what the tokenizer makes of the whole.

    Only a short window of tokens is decoded again for each new one. Text that later tokens could change is held back:
    a trailing incomplete UTF-8 sequence, and runs of byte tokens such as <0xE2>, which decode together.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: the prompt that the answer continues. Some tokenizers drop a blank at the beginning of a text,
        which the first word of an answer is not."""
        self._tokenizer = tokenizer
        self._window = [token for token in context[-KEEP_TOKENS:] if not tokenizer.is_silent(token)]
        before = tokenizer.decode(self._window)
        if before.endswith(REPLACEMENT):  # the prompt ends within a character: its rest belongs to the answer
            self._window, before = [], ""
        self._shown = len(before)
        """Characters of the window's text that were given out."""

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._tokenizer.decode(self._window)
        piece = self._give(text, len(text) - text.endswith(REPLACEMENT))
        if len(self._window) > MAX_WINDOW:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """What was held back; nothing may be added afterwards."""
        text = self._tokenizer.decode(self._window)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _shorten(self, text: str) -> None:
        """Drops the window's oldest tokens where that changes nothing to come."""
        start = len(self._window) - KEEP_TOKENS
        while start and self._tokenizer.is_byte(self._window[start]):
            start -= 1  # a run of byte tokens stays whole
        tail = self._tokenizer.decode(self._window[start:])
        shown = self._shown - len(text) + len(tail)
        if len(tail) > MAX_RAGGED and shown > 0 and text.endswith(tail[MAX_RAGGED:]):
            self._window, self._shown = self._window[start:], shown


class AnswerText:
    """The text of one answer as it grows, and whether a stop string has ended it.

    The engine and its client each keep one and come to the same result, for both see the same tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stop = StopStrings(stop)
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._num_tokens = 0
        self._done = False
        self._text = ""
        self.stop_string: str | None = None
        """The one that ended the text."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int]) -> AnswerText:
        return cls(
            tokenizer,
            params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            prompt_ids=prompt_ids,
        )

    def add(self, token: int) -> bool:
        """True when this token completed a stop string; the text ends there."""
        if self._done:
            return False
        self._num_tokens += 1
        return self._append(self._detokenizer.add(token))

    def finish(self) -> bool:
        """Adds what was held back. True when that completed a stop string."""
        if self._done:
            return False
        stopped = self._append(self._detokenizer.finish())
        self._done = True
        return stopped

    @property
    def visible(self) -> str:
        """The text without an end that might still become part of a stop string."""
        if self._done or self._include_stop:
            return self._text
        return self._text[: len(self._text) - self._stop.num_open]

    def _append(self, piece: str) -> bool:
        self._text += piece
        found = self._stop.read(piece)
        if not found or self._num_tokens <= self._min_tokens:
            return False
        start, stop = found[0]
        self._text = self._text[: start + len(stop) * self._include_stop]
        self._done, self.stop_string = True, stop
        return True
