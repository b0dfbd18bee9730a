"""Options that ban, favour, report and repeat, against plain restatements; and options of the wrong type."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.logprobs import from_rows, top_logprobs
from pt_trtllm.runtime.protocol import request_from_json, request_to_json
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.sampling import Sampler, SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])
TOKENIZER = Tokenizer(Path(__file__).parents[2] / "examples/tiny-pt")


def engine_config(vocab_size: int = 50) -> EngineConfig:
    model = ModelConfig(
        vocab_size=vocab_size, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, head_dim=4,
        intermediate_size=8, eos_token_id=(2,),
    )  # fmt: skip
    checkpoint = CheckpointConfig(model=model, world_size=1, dtype="float32")
    return EngineConfig(backend="cpu", checkpoint=checkpoint, limits=BuildLimits().resolve(64))


def drawn(count: int, **options: object) -> list[int]:
    params = SamplingParams(max_tokens=100, seed=1, **options)  # type: ignore[arg-type]
    sampler = Sampler(params, [], len(LOGITS), frozenset())
    return [sampler.next_token(LOGITS, index) for index in range(count)]


def test_logit_bias_shifts_the_distribution() -> None:
    assert drawn(2, logit_bias={0: 1.5}) == [0, 0]
    assert drawn(2, logit_bias={"3": 4.5, 4: -0.5}) == [3, 3]
    params = SamplingParams(temperature=1.0, logit_bias={2: 2.0, 4: -1.0}, seed=3)
    sampler = Sampler(params, [], 6, frozenset())
    tokens = torch.tensor([sampler.next_token(LOGITS, 0) for _ in range(10000)])
    expected = (LOGITS + torch.tensor([0.0, 0.0, 2.0, 0.0, -1.0, 0.0])).softmax(0)
    assert torch.allclose(tokens.bincount(minlength=6) / 10000, expected, atol=0.02)


def test_logit_bias_comes_before_penalties() -> None:
    # 3.0 - 1.0 = 2.0, which the penalty halves: below token 1's 1.5
    params = SamplingParams(logit_bias={4: -1.0, 1: 0.5, 0: -50.0}, repetition_penalty=2.0)
    assert Sampler(params, [4], 6, frozenset()).next_token(LOGITS, 0) == 1


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_bad_words_are_never_produced_and_nothing_else_changes(rows: list[list[int]], greedy: bool) -> None:
    temperature = None if greedy else 2.0
    params = SamplingParams(bad_words_ids=rows, temperature=temperature, seed=5)  # type: ignore[arg-type]
    sampler, output = Sampler(params, [0, 1, 2], 6, frozenset()), []
    generator = torch.Generator().manual_seed(7)
    for index in range(40):
        logits = torch.randn(6, generator=generator)
        token = sampler.next_token(logits, index)
        banned = {row[-1] for row in rows if [*output, row[-1]][-len(row) :] == row}
        assert token not in banned
        if greedy:
            assert token == max(set(range(6)) - banned, key=lambda candidate: float(logits[candidate]))
        output.append(token)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_logprobs_are_of_the_raw_logits(count: int) -> None:
    expected = LOGITS - math.log(sum(math.exp(x) for x in LOGITS.tolist()))
    for token in range(6):
        row = top_logprobs(LOGITS, token, count)
        ranked = sorted(range(6), key=lambda other: -float(LOGITS[other]))
        assert row[0][0] == token
        assert {other for other, _, _ in row} == {token, *ranked[:count]}
        assert len(row) == len({other for other, _, _ in row})
        for other, logprob, rank in row:
            assert logprob == pytest.approx(float(expected[other]), abs=1e-6)
            assert ranked[rank - 1] == other
    (entry,) = from_rows([top_logprobs(LOGITS, 2, 1)])
    assert list(entry) == [2, 4]
    assert (entry[2].rank, entry[4].rank) == (5, 1)


def test_samples_have_seeds_of_their_own_and_the_first_keeps_the_seed() -> None:
    params = SamplingParams(n=5, temperature=1.0, seed=2**64 - 1, prompt_logprobs=1)
    samples = params.samples()
    assert samples == params.samples()
    assert [sample.n for sample in samples] == [1] * 5
    assert len({sample.seed for sample in samples}) == 5
    assert samples[0].seed == params.seed
    assert [sample.prompt_logprobs for sample in samples] == [1, None, None, None, None]
    assert {sample.seed for sample in SamplingParams(n=2, temperature=1.0).samples()} == {None}


def test_requests_cross_the_socket_unchanged() -> None:
    params = SamplingParams(
        stop=("a", "é"), logit_bias={3: -1.5, 12: 100}, bad_words_ids=((1, 2), (3,)), logprobs=2, stop_token_ids=(4,),
        prompt_logprobs=0, include_stop_str_in_output=True, top_p=0.5,
    )  # fmt: skip
    request = Request(prompt_ids=(1, 2), params=params, context_logits=True)
    assert request_from_json(json.loads(json.dumps(request_to_json(request)))) == request
    hash(params)


def test_the_engine_ends_a_sequence_at_its_stop_string() -> None:
    ids = TOKENIZER.encode("the cat sat on the mat", add_special_tokens=False)
    params = SamplingParams(stop=("at",), ignore_eos=True)
    sequence = Sequence.start(0, Request(prompt_ids=(1,), params=params), engine_config(2048), TOKENIZER)
    for count, token in enumerate(ids, start=1):
        sequence.accept(token)
        assert (sequence.finish_reason == "stop") == ("at" in TOKENIZER.decode(ids[:count]))
        if sequence.finish_reason:
            break
    assert sequence.finish_reason == "stop"


def test_bad_words_are_spelled_with_and_without_a_blank() -> None:
    request = Request(prompt_ids=(1,), params=SamplingParams(bad_words=(" the", "cat"), bad_words_ids=((9,),)))
    spelled = request.with_token_bans(TOKENIZER, "r").params
    assert spelled.bad_words == ()
    texts = {TOKENIZER.decode(row) for row in spelled.bad_words_ids[1:]}
    assert texts == {"the", " the", "cat", " cat"}
    assert spelled.bad_words_ids[0] == (9,)


def test_text_options_without_a_tokenizer_are_refused() -> None:
    request = Request(prompt_ids=(1,), params=SamplingParams(stop=("x",), bad_words=("y",)))
    with pytest.raises(ConfigError, match="p 3: stop and bad_words need a tokenizer"):
        request.with_token_bans(None, "p 3")
    with pytest.raises(ConfigError, match="need a tokenizer"):
        Sequence.start(0, request, engine_config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {50: 1.0}}, "logit_bias has token id 50, outside the vocabulary of 50"),
        ({"bad_words_ids": ((1, 51),)}, "bad_words_ids has token id 51"),
        ({"bad_words_ids": tuple((token,) for token in range(50))}, "may leave no token"),
        ({"bad_words_ids": tuple((token,) for token in range(50) if token != 2)}, "may leave no token"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(options: dict[str, object], message: str) -> None:
    request = Request(prompt_ids=(1,), params=SamplingParams(**options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        request.check(engine_config(), "prompt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "5"}, "max_tokens is '5', expected a whole number"),
        ({"max_tokens": None}, "max_tokens is None, expected a whole number"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5, expected a whole number"),
        ({"temperature": True}, "temperature is True, expected a number"),
        ({"repetition_penalty": None}, "repetition_penalty is None, expected a number"),
        ({"top_k": False}, "top_k is False, expected a whole number"),
        ({"seed": 1.0}, "seed is 1.0, expected a whole number"),
        ({"ignore_eos": 1}, "ignore_eos is 1, expected true or false"),
        ({"stop": 3}, "stop is 3, expected a list of strings"),
        ({"stop": ["a", 3]}, "expected a list of strings"),
        ({"stop": None}, "stop is None, expected a list of strings"),
        ({"stop": ""}, "stop has an empty string"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7, expected a list of token ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids is '12', expected a list of token ids"),
        ({"bad_words": "word"}, "bad_words is 'word', expected a list of strings"),
        ({"bad_words": [""]}, "bad_words has an empty string"),
        ({"bad_words_ids": [1, 2]}, "expected lists of token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids has an empty sequence"),
        ({"bad_words_ids": [[1, -2]]}, r"bad_words_ids is \[\[1, -2\]\], expected lists of token ids, each 0"),
        ({"stop_token_ids": [-1_000_000]}, r"stop_token_ids is \[-1000000\], expected a list of token ids, each 0"),
        ({"stop_token_ids": [2**31]}, "expected a list of token ids, each 0 to 2147483647"),
        ({"logit_bias": {"9" * 5000: 1}}, "expected numbers by token id"),
        ({"logit_bias": [1]}, "expected numbers by token id"),
        ({"logit_bias": {"x": 1}}, "expected numbers by token id"),
        ({"logit_bias": {"1": None}}, "expected numbers by token id"),
        ({"logit_bias": {"1": 101}}, "expected values from -100 to 100"),
        ({"logit_bias": {"1": math.nan}}, "expected values from -100 to 100"),
        ({"logprobs": -1}, "logprobs is -1, expected 0 to 20"),
        ({"logprobs": True}, "logprobs is True, expected a whole number"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"n": 0}, "n is 0, expected 1 to 128"),
        ({"n": 2}, "greedy answers are all alike; set a temperature"),
    ],
)
def test_options_of_the_wrong_type_or_size_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def repr_of(value: float) -> str:
    return f"{value.bit_length()} bits" if isinstance(value, int) else repr(value)


NUMBERS = (
    "max_tokens", "n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "min_tokens", "logprobs", "prompt_logprobs",
)  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, math.inf, -math.inf, math.nan, 1e300], ids=repr_of)
def test_no_number_is_without_bounds(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is ") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("penalty", [1e-39, 1e-3, 0, -1, 100.5, 1e300, 10**400], ids=repr_of)
def test_a_repetition_penalty_that_leaves_float32_is_refused(penalty: float) -> None:
    with pytest.raises(ConfigError, match=r"repetition_penalty is .*, expected 0.01 to 100"):
        SamplingParams(repetition_penalty=penalty)
    for fine in (0.01, 0.5, 1, 1.2, 100):
        assert SamplingParams(repetition_penalty=fine).repetition_penalty == fine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ["a"] * 65}, "stop has 65 entries, expected at most 64"),
        ({"stop": "a" * 1025}, "stop has a string of 1025 characters, expected at most 1024"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids has 1025 entries, expected at most 1024"),
        ({"bad_words": ["a"] * 513}, "make 1026 sequences .*, expected at most 1024"),
        ({"bad_words": ["a" * 1025]}, "bad_words has a string of 1025 characters"),
        ({"bad_words": ["a" * 1024] * 33}, "bad_words has 33792 characters, expected at most 32768"),
        ({"bad_words_ids": [[1]] * 1025}, "make 1025 sequences .*, expected at most 1024"),
        ({"bad_words_ids": [[1] * 40_000]}, "bad_words_ids has 40000 tokens, expected at most 32768"),
        ({"logit_bias": dict.fromkeys(range((1 << 18) + 1), 1)}, "logit_bias has 262145 entries"),
        (
            {"logit_bias": dict.fromkeys(range(3000), 1), "n": 100, "temperature": 1},
            "logit_bias has 3000 entries for each of n = 100 answers, expected at most 262144 together",
        ),
        ({"logit_bias": dict.fromkeys(range(1000), math.nan)}, "logit_bias of token 0 is nan"),
        ({"guided_choice": ["a" * 1000] * 300}, "a guide is longer than 262144 characters"),
        ({"stop": ["a\ud800"]}, "stop is not valid Unicode"),
        ({"bad_words": ["\ud800"]}, "bad_words is not valid Unicode"),
        ({"guided_regex": "\ud800"}, "guided_regex is not valid Unicode"),
    ],
)
def test_lists_have_bounds(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", ["stop", "stop_token_ids", "bad_words", "bad_words_ids", "logit_bias", "guided_choice", "guided_json"]
)
def test_what_is_nested_deeply_is_refused_in_one_line(name: str) -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    value = {"1": deep} if name.endswith(("bias", "json")) else deep
    for _ in range(5000 if name == "guided_json" else 0):
        value = {"items": value}
    with pytest.raises(ConfigError, match=name) as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 400


def test_words_and_ids_at_their_bounds_are_still_so_as_tokens() -> None:
    params = SamplingParams(bad_words=tuple(f"w{index}" for index in range(500)), bad_words_ids=((1,),) * 24)
    spelled = Request(prompt_ids=(1,), params=params).with_token_bans(TOKENIZER, "r").params
    assert 1000 < len(spelled.bad_words_ids) <= 1024


def test_end_tokens_outside_the_vocabulary_are_ignored() -> None:
    params = SamplingParams(stop_token_ids=(50, 2**31 - 1), min_tokens=3)
    sampler = Sampler(params, [1], 6, frozenset(params.stop_token_ids))
    assert sampler.next_token(LOGITS, 0) == 4
