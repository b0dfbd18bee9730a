"""Guided answers stay inside their grammar, whatever the logits say, and end when it is complete."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.runtime.guided import Guide, Guides, Patience
from pt_trtllm.runtime.params import MAX_GUIDE, SamplingParams
from pt_trtllm.runtime.sampling import Sampler
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.runtime.workers import Workers

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples/tiny-pt"
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


def test_answers_of_one_grammar_stand_where_each_of_them_is() -> None:
    guide, other = (GUIDES.make(SamplingParams(guided_choice=("yes", "no"))) for _ in range(2))
    assert guide is not None
    assert other is not None
    (yes,) = TOKENIZER.encode("yes", add_special_tokens=False)[:1]
    other.accept(yes)
    row = torch.zeros(MODEL.vocab_size)
    assert torch.isfinite(guide.mask(row)[yes])
    assert not torch.equal(guide.mask(row), other.mask(row))


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
    guide = GUIDES.make(SamplingParams(**options))  # type: ignore[arg-type]
    assert guide is not None
    with pytest.raises(ConfigError, match=message) as caught:
        guide.mask(torch.zeros(MODEL.vocab_size))
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


AMBIGUOUS = "start: e\ne: e e | e e e | e e e e | f f | /[a-z ]/\nf: e e | f f | /[a-z ]/"


def test_an_ambiguous_grammar_ends_as_an_error_and_not_as_an_answer() -> None:
    with pytest.raises(ConfigError, match=r"the grammar is too ambiguous to follow: .*; simplify it") as caught:
        answer(SamplingParams(guided_grammar=AMBIGUOUS), seed=0)
    assert len(str(caught.value).splitlines()) == 1
    assert "<" not in str(caught.value)


def names(count: int) -> list[str]:
    letters = "bcdfghjklmpqrtvwxyz"
    return ["".join(name) for name in itertools.islice(itertools.product(letters, repeat=4), count)]


@pytest.mark.parametrize("kind", ["rules", "terminals", "schema"])
def test_rules_may_refer_to_each_other_as_deep_as_the_longest_grammar_has_room(kind: str) -> None:
    """llguidance descends with them: on a usual stack that ends the process, here in a child."""
    if kind == "schema":
        chain = names((MAX_GUIDE - 100) // 49)
        entries = {name: {"items": {"$ref": f"#/{after}"}} for name, after in itertools.pairwise(chain)}
        text = json.dumps({**entries, chain[-1]: {"type": "null"}, "$ref": f"#/{chain[0]}"}, separators=(",", ":"))
        params = f"guided_json={text!r}"
    else:
        chain = [name.upper() if kind == "terminals" else name for name in names(MAX_GUIDE // 10 - 10)]
        rules = "".join(f"{name}:{after}\n" for name, after in itertools.pairwise(chain))
        params = f"guided_grammar={f'start: {chain[0]}{chr(10)}{rules}{chain[-1]}:{chr(34)}a{chr(34)}'!r}"
    script = f"""
import torch
from tests.unit.test_guided import GUIDES, MODEL, SamplingParams
GUIDES.make(SamplingParams({params})).mask(torch.zeros(MODEL.vocab_size))
print("followed")
"""
    done = subprocess.run(
        [sys.executable, "-"], input=script, text=True, capture_output=True, cwd=REPOSITORY, check=False
    )
    assert done.stdout == "followed\n", (done.returncode, done.stderr[-500:])


def test_nobody_waits_longer_than_patience_lasts() -> None:
    """For a grammar whose work does not end, as for one that is quick."""
    begun, release = threading.Event(), threading.Event()
    workers = Workers("test", 1, stack_bytes=0)

    def work() -> tuple[object, torch.Tensor | None]:
        begun.set()
        release.wait()
        return None, None

    job = workers.submit(work)
    patience = Patience()
    guide = Guide(workers, patience, job)
    begun.wait()
    while patience.left_s > 0:
        assert not guide.is_ready(patient=True)
    assert not guide.is_ready(patient=True)
    release.set()
    job.result()
    assert guide.is_ready()
    assert guide.complete


def test_a_panic_is_the_trouble_of_one_guide() -> None:
    class Panic(BaseException):
        """As pyo3's, not an Exception."""

    def work() -> tuple[object, torch.Tensor | None]:
        raise Panic("a path: /etc/passwd")

    workers = Workers("test", 1, stack_bytes=0)
    with pytest.raises(PtError, match=r"^the grammar cannot be followed: Panic$") as caught:
        Guide(workers, Patience(), workers.submit(work)).mask(torch.zeros(1))
    assert caught.value.kind == "failed"
    assert workers.submit(lambda: 3).result() == 3
