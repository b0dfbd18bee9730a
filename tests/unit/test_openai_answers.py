"""Answers as clients of the OpenAI endpoint see them grow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from pt_trtllm.openai.answers import Answer, Ask
from pt_trtllm.openai.logprobs import Offsets, TokenLogprob, chat_logprobs, completion_logprobs, from_logits, from_row
from pt_trtllm.openai.metrics import Metrics, Stopwatch
from pt_trtllm.openai.page import load_page
from pt_trtllm.openai.tensors import Piece
from pt_trtllm.openai.token_text import TokenText
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

TOKENIZER = Tokenizer(Path(__file__).parents[2] / "examples/tiny-pt")
TEXTS = TokenText(TOKENIZER)
EOS = 2
ASK = Ask(request_id="x", prompt_ids=(1, 5), params=SamplingParams(max_tokens=100), end_ids=frozenset({EOS}), values={})


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def with_params(**options: object) -> Ask:
    return dataclasses.replace(ASK, params=dataclasses.replace(ASK.params, **options))  # type: ignore[arg-type]


def test_pieces_join_to_the_text_whatever_their_borders() -> None:
    text = " of Größe 雪 and 🙂 emoji, she said."
    ids = tokens_of(text)
    for size in (1, 2, 5, len(ids)):
        answer = Answer(0, ASK, TOKENIZER)
        deltas = [answer.take(Piece(ids[start : start + size])) for start in range(0, len(ids), size)]
        deltas.append(answer.finish(None))
        assert "".join(delta.text for delta in deltas) == text
        assert not any("\ufffd" in delta.text for delta in deltas)
        assert sum(delta.num_tokens for delta in deltas) == len(ids)
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_a_stop_string_ends_the_answer_and_what_comes_behind_does_not_count() -> None:
    before, behind = tokens_of(" It was a truth and"), tokens_of(" more")
    answer = Answer(0, with_params(stop=("truth",)), TOKENIZER)
    delta = answer.take(Piece([*before, *behind]))
    assert (delta.text, delta.finish_reason) == (" It was a ", "stop")
    assert delta.num_tokens < len(before)
    assert answer.finished


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    answer = Answer(0, with_params(stop=("truth and honour",)), TOKENIZER)
    assert answer.take(Piece(tokens_of(" a truth"))).text == " a "
    assert answer.take(Piece(tokens_of(" and so"))).text == "truth and so"


def test_an_answer_ends_by_itself_with_the_models_end_token() -> None:
    answer = Answer(0, ASK, TOKENIZER)
    answer.take(Piece([*tokens_of(" Yes."), EOS]))
    assert answer.finish(None).finish_reason == "stop"
    answer = Answer(0, with_params(stop_token_ids=(5,)), TOKENIZER)
    assert answer.take(Piece([7, 5, 8])).num_tokens == 2


@pytest.mark.parametrize(("reason", "told"), [("stop", "stop"), ("length", "length"), ("timeout", "length")])
def test_the_servers_reason_becomes_one_that_openai_knows(reason: str, told: str) -> None:
    assert Answer(0, ASK, TOKENIZER).finish(reason).finish_reason == told


def test_log_probabilities_of_logits_are_those_of_torch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 30
    rows = from_logits(logits.numpy(), [4, 9, 49], 5)
    values, tokens = logits.log_softmax(-1).topk(5)
    for index, row in enumerate(rows):
        assert [token for token, _ in row.top] == tokens[index].tolist()
        np.testing.assert_allclose([value for _, value in row.top], values[index], rtol=1e-4, atol=1e-5)
        assert row.logprob == pytest.approx(logits.log_softmax(-1)[index, row.token].item(), rel=1e-4, abs=1e-5)


def test_the_drawn_token_is_among_the_most_likely_only_where_it_belongs() -> None:
    assert from_row([(7, -3.0, 9), (4, -0.1, 1), (5, -0.2, 2)], 2) == TokenLogprob(7, -3.0, ((4, -0.1), (5, -0.2)))
    assert from_row([(4, -0.1, 1), (5, -0.2, 2)], 2) == TokenLogprob(4, -0.1, ((4, -0.1), (5, -0.2)))
    assert from_row([(4, -0.1, 1)], 0) == TokenLogprob(4, -0.1, ())


def test_text_offsets_point_into_the_text() -> None:
    ids = tokens_of("It is a truth")
    rows, offsets = [TokenLogprob(token, -1.0) for token in ids], Offsets(TEXTS)
    told = [completion_logprobs(part, TEXTS, offsets) for part in (rows[:2], rows[2:])]
    text = "".join(token for part in told for token in part["tokens"])
    assert text == "It is a truth"
    for part in told:
        for token, offset in zip(part["tokens"], part["text_offset"], strict=True):
            assert text[offset:].startswith(token)


def parts_of_a_character() -> list[int]:
    ids = tokens_of("雪")
    assert len(ids) == 3, "one token a byte: what this test is about"
    return ids


def test_parts_of_a_character_keep_their_bytes_and_stay_apart() -> None:
    first, second, third = parts_of_a_character()
    rows = [TokenLogprob(first, -0.1, ((first, -0.1), (second, -0.2), (third, -0.3))), TokenLogprob(second, -0.1),
            TokenLogprob(third, -0.1), TokenLogprob(*tokens_of("!"), -0.1)]  # fmt: skip
    chat = chat_logprobs(rows, TEXTS)["content"]
    assert bytes(byte for entry in chat for byte in entry["bytes"]).decode() == "雪!"
    assert [entry["token"] for entry in chat] == [r"\xe9", r"\x9b", r"\xaa", "!"]
    assert [entry["bytes"] for entry in chat[0]["top_logprobs"]] == [[0xE9], [0x9B], [0xAA]]
    told = completion_logprobs(rows, TEXTS, Offsets(TEXTS))
    assert told["tokens"] == [r"bytes:\xe9", r"bytes:\x9b", r"bytes:\xaa", "!"]
    assert told["top_logprobs"][0] == {r"bytes:\xe9": -0.1, r"bytes:\x9b": -0.2, r"bytes:\xaa": -0.3}
    assert told["text_offset"] == [0, 0, 0, 1]


def test_the_bytes_of_every_token_join_to_the_text() -> None:
    text = " of Größe 雪 and 🙂 emoji,\n\tshe\u00a0said."
    assert b"".join(map(TEXTS.bytes_of, tokens_of(text))).decode() == text
    names = {TEXTS.name_of(token) for token in range(TOKENIZER.vocab_size)}
    assert len(names) == TOKENIZER.vocab_size


def test_tokens_of_a_vocabulary_with_byte_fallback_have_their_blanks_and_bytes(tmp_path: Path) -> None:
    """As Llama 2 and its kin have it: words begin with U+2581, and what is no word is bytes."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "t",
        "h",
        "e",
        "\u2581t",
        "he",
        "\u2581the",
    ]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    texts = TokenText(tokenizer)
    ids = tokenizer.encode("the the雪")
    assert [texts.text_of(token) for token in ids] == [" the", " the", r"\xe9", r"\x9b", r"\xaa"]
    assert b"".join(map(texts.bytes_of, ids)).decode() == " the the雪"
    assert texts.name_of(ids[-1]) == r"bytes:\xaa"


def test_impossible_tokens_have_a_number_that_json_knows() -> None:
    told = completion_logprobs([TokenLogprob(5, float("-inf"))], TEXTS, Offsets(TEXTS))
    assert told["token_logprobs"] == [-9999.0]


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.requests[200] += 2
    watch = Stopwatch(metrics)
    watch.token(1)
    watch.token(3)
    watch.finish(1)
    lines = metrics.text().splitlines()
    assert 'pt_openai_requests_total{status="200"} 2' in lines
    assert "pt_openai_generation_tokens_total 4" in lines
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert f"pt_openai_{name}_seconds_count 1" in lines
        assert f'pt_openai_{name}_seconds_bucket{{le="+Inf"}} 1' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page, headers = load_page()
    assert "/*STYLE*/" not in page
    assert "/*SCRIPT*/" not in page
    addresses = [word for word in page.split() if "://" in word and "www.w3.org" not in word]
    assert addresses == []
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
