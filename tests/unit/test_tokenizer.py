"""Prompts become the tokens that `transformers` makes of them, whole; and what cannot fit is refused before that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<pad>",
}  # fmt: skip
TEXTS = ("It is a truth", "It is a truth universally acknowledged, that a single man in possession of a good fortune")


@pytest.mark.parametrize("left_over", [{"truncation": TRUNCATION}, {"padding": PADDING}], ids=["truncation", "padding"])
def test_what_a_file_says_about_truncation_and_padding_is_ignored(left_over: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the test extra")
    from transformers import PreTrainedTokenizerFast

    data = json.loads((EXAMPLE / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, **left_over}))
    ours, plain = Tokenizer(tmp_path), Tokenizer(EXAMPLE)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"] == plain.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert json.loads(ours.to_json()) == json.loads(plain.to_json()), "guides get the same tokenizer"


def test_a_text_that_cannot_fit_is_refused_by_its_length() -> None:
    tokenizer = Tokenizer(EXAMPLE)
    most = 10 * tokenizer.longest_piece
    tokenizer.check_fits("x" * most, 10, "text_input")
    with pytest.raises(
        ConfigError, match=rf"text_input has {most + 1} characters, .*maximum input length \(10\)"
    ) as told:
        tokenizer.check_fits("x" * (most + 1), 10, "text_input")
    assert told.value.kind == "too_long"


def test_a_text_that_might_fit_is_counted_up_to_the_limit() -> None:
    tokenizer = Tokenizer(EXAMPLE)
    text = "It is a truth. " * 20_000
    count = len(tokenizer.encode(text, add_special_tokens=False))
    assert not tokenizer.has_more_tokens(text, count)
    assert tokenizer.has_more_tokens(text, count - 64 * 6)
    with pytest.raises(ConfigError, match="text_input of 300000 characters exceeds maximum input length") as told:
        tokenizer.check_fits(text, max(len(text) // tokenizer.longest_piece + 1, count // 2), "text_input")
    assert told.value.kind == "too_long"
