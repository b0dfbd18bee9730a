"""Guided answers stay inside their grammar, whatever the logits say, and end when it is complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.guided import Guides
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.sampling import Sampler
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
TOKENIZER = Tokenizer(EXAMPLE)
MODEL = ModelConfig(
    vocab_size=2056, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, head_dim=4, intermediate_size=8,
    eos_token_id=(2,),
)  # fmt: skip
GUIDES = Guides(TOKENIZER, MODEL)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def answer(params: SamplingParams, seed: int, limit: int = 200) -> str:
    """What is drawn from random logits until the guide says it is complete."""
    sampler = Sampler(params, [1], MODEL.vocab_size, frozenset({2}), GUIDES.make(params))
    generator, tokens = torch.Generator().manual_seed(seed), list[int]()
    assert sampler.guide is not None
    while not sampler.guide.complete and len(tokens) < limit:
        assert sampler.num_candidates(len(tokens)) == 0
        tokens.append(sampler.next_token(5 * torch.randn(MODEL.vocab_size, generator=generator), len(tokens)))
        if tokens[-1] == 2:
            break
    else:
        assert sampler.guide.complete, "the answer did not end"
    return TOKENIZER.decode(tokens)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([None, 0.7, 1.5]))
def test_answers_are_json_of_their_schema(seed: int, temperature: float | None) -> None:
    data = json.loads(answer(SamplingParams(guided_json=SCHEMA, temperature=temperature, seed=seed), seed))  # type: ignore[arg-type]
    assert set(data) == {"name", "age"}
    assert 0 <= data["age"] <= 99
    assert len(data["name"]) <= 12


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([1.0, 1.5]))
def test_answers_match_their_expression(seed: int, penalty: float) -> None:
    pattern = r"[A-Z][a-z]{2,8}, (17|18)[0-9]{2}"
    params = SamplingParams(guided_regex=pattern, temperature=1.0, seed=seed, repetition_penalty=penalty, min_tokens=60)
    assert re.fullmatch(pattern, answer(params, seed).strip())


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_one_of_the_choices(seed: int) -> None:
    choices = ("yes", "no", "it is a truth")
    assert answer(SamplingParams(guided_choice=choices), seed) in choices


@pytest.mark.parametrize("grammar", ['root ::= ("a" | "b") "-" [0-9]', 'start: ("a" | "b") "-" /[0-9]/'])
def test_answers_are_of_their_grammar(grammar: str) -> None:
    assert {bool(re.fullmatch("[ab]-[0-9]", answer(SamplingParams(guided_grammar=grammar), s))) for s in range(6)} == {
        True
    }


def test_a_fork_stands_where_its_origin_did() -> None:
    guide = GUIDES.make(SamplingParams(guided_choice=("yes", "no")))
    assert guide is not None
    (yes,) = TOKENIZER.encode("yes", add_special_tokens=False)[:1]
    fork = guide.fork()
    fork.accept(yes)
    row = torch.zeros(MODEL.vocab_size)
    assert torch.isfinite(guide.mask(row)[yes])
    assert not torch.equal(guide.mask(row), fork.mask(row))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guided_regex": "a["}, "guided_regex is not valid: .*unclosed character class"),
        ({"guided_json": "{"}, "guided_json is not valid"),
        ({"guided_json": '{"type": "banana"}'}, "guided_json is not valid: .*banana"),
        ({"guided_grammar": "root ::= missing"}, "guided_grammar is not valid"),
    ],
)
def test_malformed_guides_are_refused_in_one_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GUIDES.make(SamplingParams(**options))  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guided_regex": "a", "guided_json": {}}, "guided_json and guided_regex are set, expected at most one guide"),
        ({"guided_choice": ["a", ""]}, "guided_choice has an empty string"),
        ({"guided_choice": [1]}, "guided_choice is .*, expected a list of strings"),
        ({"guided_regex": 3}, "guided_regex is 3, expected text"),
        ({"guided_regex": "a" * 300_000}, "a guide is longer than 262144 characters"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_a_guide_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="guided decoding needs a tokenizer"):
        Guides(None, MODEL).make(SamplingParams(guided_regex="a"))
