"""The `preprocessing` model: text to token ids.

What is long is tokenized in threads of its own, so that it keeps nobody else waiting; Triton's Python backend lets its
response follow when `execute` has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.serving.models.triton import (
    FINAL,
    array,
    error_response,
    flag,
    open_tokenizer,
    parameters,
    scalar,
    taken,
    text,
    texts,
)
from pt_trtllm.serving.tensors import PREPROCESSING_INPUTS
from pt_trtllm.serving.word_lists import pack_words

NO_TOKEN = -1
"""As an end token: none ends the answer."""
INPUTS = tuple(tensor.name for tensor in PREPROCESSING_INPUTS)
CHECKS: dict[str, Callable[[tuple[str, ...]], SamplingParams]] = {
    "BAD_WORDS_DICT": lambda words: SamplingParams(bad_words=words),
    "STOP_WORDS_DICT": lambda words: SamplingParams(stop=words),
}
"""The option that each list of words is has bounds for them, and names what is beyond."""
LONG = 1 << 14
"""Characters, of all texts of a request together: tens of milliseconds."""
LONG_AT_A_TIME = 2
"""The library lets other threads run meanwhile (`encode_in_thread`)."""


class PreprocessModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = parameters(args)
        self._tokenizer = open_tokenizer(values)
        self._end_id, self._pad_id = int(values.get("end_id", NO_TOKEN)), int(values.get("pad_id", NO_TOKEN))
        self._special = flag(values.get("add_special_tokens"), True, "add_special_tokens")
        limit = values.get("max_input_len")
        self._max_tokens = int(limit) if limit else None
        self._threads = ThreadPoolExecutor(LONG_AT_A_TIME, "pt-trtllm-long-texts")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender, given = request.get_response_sender(), taken(request, INPUTS)
            if _num_characters(given) > LONG:
                self._threads.submit(self._answer, sender, given)
            else:
                self._answer(sender, given)

    def finalize(self) -> None:
        self._threads.shutdown()

    def _answer(self, sender: Any, given: dict[str, Any]) -> None:
        tensors: list[Any] = []  # held in a name until they are sent: Triton must not be the last to hold them
        try:
            tensors = self._tensors(given)
            response = pb_utils.InferenceResponse(tensors)
        except Exception as error:  # whatever it is, the client must hear of it
            response = error_response(error)
        sender.send(response, flags=FINAL)

    def _tensors(self, request: dict[str, Any]) -> list[Any]:
        queries = array(request, "QUERY")
        rows = [self._encode(value, "text_input") for value in queries.reshape(-1)]
        decoder = array(request, "DECODER_QUERY")
        decoder_rows = [[] for _ in rows] if decoder is None else [
            self._encode(value, "decoder_text_input") for value in decoder.reshape(-1)
        ]  # fmt: skip
        count = len(rows)
        end_id, pad_id = scalar(request, "END_ID"), scalar(request, "PAD_ID")
        extra = array(request, "PROMPT_TABLE_EXTRA_ID")
        end_id = self._end_id if end_id is None else end_id
        pad_id = self._pad_id if pad_id is None else pad_id
        ids, lengths = _padded(rows, max(0, pad_id))
        decoder_ids, decoder_lengths = _padded(decoder_rows, max(0, pad_id))
        return [
            pb_utils.Tensor("INPUT_ID", ids),
            pb_utils.Tensor("REQUEST_INPUT_LEN", lengths),
            pb_utils.Tensor("DECODER_INPUT_ID", decoder_ids),
            pb_utils.Tensor("REQUEST_DECODER_INPUT_LEN", decoder_lengths),
            pb_utils.Tensor("REQUEST_OUTPUT_LEN", array(request, "REQUEST_OUTPUT_LEN").reshape(count, 1)),
            pb_utils.Tensor("BAD_WORDS_IDS", self._words(request, "BAD_WORDS_DICT", count)),
            pb_utils.Tensor("STOP_WORDS_IDS", self._words(request, "STOP_WORDS_DICT", count)),
            pb_utils.Tensor("EMBEDDING_BIAS", self._bias(request, count)),
            pb_utils.Tensor("OUT_END_ID", _column(end_id, count)),
            pb_utils.Tensor("OUT_PAD_ID", _column(pad_id, count)),
            pb_utils.Tensor(
                "OUT_PROMPT_TABLE_EXTRA_IDS", np.zeros((count, 0), np.uint64) if extra is None else _repeat(extra, ids)
            ),
        ]

    def _encode(self, value: Any, name: str) -> list[int]:
        query = text(value, name)
        if self._max_tokens is not None:
            self._tokenizer.check_fits(query, self._max_tokens, name)
        return self._tokens_of(query, self._special)

    def _tokens_of(self, query: str, special: bool) -> list[int]:
        encode = self._tokenizer.encode if len(query) <= LONG else self._tokenizer.encode_in_thread
        return encode(query, add_special_tokens=special)

    def _words(self, request: Any, name: str, count: int) -> Any:
        rows = [texts(request, name, row) for row in range(count)]
        for words in rows:
            CHECKS[name](words)
        return pack_words([[self._tokens_of(word, False) for word in words] for words in rows])

    def _bias(self, request: Any, count: int) -> Any:
        """One value per token of the vocabulary; nothing where no word is given."""
        words, weights = texts(request, "EMBEDDING_BIAS_WORDS"), array(request, "EMBEDDING_BIAS_WEIGHTS")
        if not words:
            return np.zeros((count, 0), np.float32)
        values = [] if weights is None else [float(value) for value in weights.reshape(len(weights), -1)[0]]
        if len(values) != len(words):
            raise ConfigError(
                f"embedding_bias_words has {len(words)} words, embedding_bias_weights {len(values)} numbers; "
                "expected as many of both"
            )
        return np.tile(self._bias_row(words, values), (count, 1))

    def _bias_row(self, words: tuple[str, ...], weights: list[float]) -> Any:
        row = np.zeros(self._tokenizer.vocab_size, np.float32)
        for word, weight in zip(words, weights, strict=True):
            np.add.at(row, self._tokens_of(word, False), weight)
        return row


def _num_characters(given: dict[str, Any]) -> int:
    """In bytes, which are at least as many."""
    return sum(len(text) for values in given.values() if values.dtype == np.object_ for text in values.reshape(-1))


def _padded(rows: list[list[int]], pad_id: int) -> tuple[Any, Any]:
    """int32 [prompts, longest], int32 [prompts, 1]"""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids, np.array([[len(row)] for row in rows], np.int32)


def _column(value: int, count: int) -> Any:
    return np.full((count, 1), value, np.int32)


def _repeat(extra: Any, ids: Any) -> Any:
    """The id of a prompt table, once per token."""
    return np.repeat(extra.reshape(len(ids), 1), ids.shape[1], axis=1).astype(np.uint64)
