"""Long texts: refused by their length where they cannot fit, and otherwise in nobody's way."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.triton import EXAMPLE, post

pytestmark = pytest.mark.triton

WORD = "It is a truth. "


def preprocess(server: TritonServer, query: str, *words: str, **others: list[str]) -> Any:
    with triton.InferenceServerClient(server.grpc_url) as client:
        return client.infer("preprocessing", question(query, *words, **others))


def question(query: str, *words: str, **others: list[str]) -> list[triton.InferInput]:
    texts = {"QUERY": [query], "EMBEDDING_BIAS_WORDS": [*words], **others}
    asked = [triton.InferInput("REQUEST_OUTPUT_LEN", [1, 1], "INT32")]
    asked[0].set_data_from_numpy(np.array([[3]], np.int32))
    if words:
        asked.append(triton.InferInput("EMBEDDING_BIAS_WEIGHTS", [1, len(words)], "FP32"))
        asked[-1].set_data_from_numpy(np.ones((1, len(words)), np.float32))
    for name, values in texts.items():
        if values:
            asked.append(triton.InferInput(name, [1, len(values)], "BYTES"))
            asked[-1].set_data_from_numpy(np.array([[value.encode() for value in values]], np.object_))
    return asked


def test_a_prompt_that_cannot_fit_is_refused_by_its_length(server: TritonServer) -> None:
    tokenizer = Tokenizer(EXAMPLE)
    most = 511 * tokenizer.longest_piece
    for model in ("ensemble", "tensorrt_llm_bls"):
        body = {"text_input": "x" * 1_000_000, "max_tokens": 2}
        status, text = post(f"{server.http_url}/v2/models/{model}/generate", body)
        assert status == 400
        assert "text_input has 1000000 characters, which exceeds maximum input length (511): so many tokens" in text
    assert preprocess(server, "x" * most).as_numpy("INPUT_ID").size > 0


def test_a_long_text_gives_what_a_short_one_gives(server: TritonServer) -> None:
    """It is tokenized in a thread of its own."""
    result = preprocess(server, WORD, WORD * 5000)
    ids = Tokenizer(EXAMPLE).encode(WORD)
    assert result.as_numpy("INPUT_ID").tolist() == [ids]
    counts = np.bincount(Tokenizer(EXAMPLE).encode(WORD * 5000, add_special_tokens=False))
    assert result.as_numpy("EMBEDDING_BIAS")[0, : len(counts)].tolist() == counts.tolist()


def test_a_long_text_keeps_nobody_waiting(server: TritonServer) -> None:
    """It takes some seconds; in these the short ones are answered, where this process is not kept from asking."""
    asked = question(WORD)
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.infer("preprocessing", asked)
        for _ in range(5):
            long = threading.Thread(target=lambda: preprocess(server, WORD, WORD * 150_000))
            long.start()
            answered = 0
            while answered < 60 and long.is_alive():
                client.infer("preprocessing", asked)
                answered += 1
            long.join()
            if answered == 60:
                return
    pytest.fail("all others waited for the long text")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"STOP_WORDS_DICT": ["x"] * 200_000}, "stop has 200000 entries, expected at most 64"),
        ({"STOP_WORDS_DICT": ["x" * 1025]}, "stop has a string of 1025 characters, expected at most 1024"),
        ({"BAD_WORDS_DICT": ["x"] * 513}, "make 1026 sequences"),
    ],
)
def test_lists_of_words_have_bounds_before_they_are_tokenized(
    server: TritonServer, words: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        preprocess(server, WORD, **words)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert preprocess(server, WORD, STOP_WORDS_DICT=["x"] * 64).as_numpy("STOP_WORDS_IDS").shape[-1] >= 64
