"""Sampling options end to end over two ranks, with the shipped example and its tokenizer."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm import LLM, SamplingParams
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from pt_trtllm.testing.cli import check_cli, refusal

pytestmark = pytest.mark.mpi

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
PROMPT = "The"
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(example_engines: dict[int, Path]) -> Path:
    """What the command line does with options is the same over any number of ranks."""
    return example_engines[1]


@pytest.fixture(scope="module")
def llm(example_llm: LLM) -> LLM:
    return example_llm


@pytest.fixture(scope="module")
def plain(llm: LLM) -> CompletionOutput:
    return llm.generate(PROMPT, GREEDY)[0].outputs[0]


def ask(llm: LLM, **options: Any) -> CompletionOutput:
    params: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, **options}
    return llm.generate(PROMPT, SamplingParams(**params))[0].outputs[0]


def stop_string(text: str) -> str:
    """A piece that begins and ends inside words."""
    start = len(text) // 2
    return text[start : start + 6]


def test_a_stop_string_ends_the_answer_where_it_is_complete(llm: LLM, plain: CompletionOutput) -> None:
    assert plain.text is not None
    assert llm.tokenizer is not None
    stop = stop_string(plain.text)
    before = llm.stats()["generated_tokens"]
    cut, whole = ask(llm, stop=[stop]), ask(llm, stop=stop, include_stop_str_in_output=True)
    assert cut.finish_reason == whole.finish_reason == "stop"
    assert cut.stop_reason == whole.stop_reason == stop
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert whole.text == cut.text + stop
    assert cut.token_ids == whole.token_ids == plain.token_ids[: len(cut.token_ids)]
    assert stop in llm.tokenizer.decode(cut.token_ids)
    assert stop not in llm.tokenizer.decode(cut.token_ids[:-1])
    # The engine itself stopped there, not only its client.
    assert llm.stats()["generated_tokens"] - before == 2 * len(cut.token_ids) < 48


def test_a_stream_never_takes_text_back(llm: LLM, plain: CompletionOutput) -> None:
    assert plain.text is not None
    stop = stop_string(plain.text)

    async def collect(**options: Any) -> list[CompletionOutput]:
        params = SamplingParams(max_tokens=24, ignore_eos=True, **options)
        return [output.outputs[0] async for output in llm.generate_async(PROMPT, params)]

    for options in ({}, {"stop": (stop,)}, {"temperature": 3.0, "seed": 5}):
        pieces = asyncio.run(collect(**options))
        expected = ask(llm, **options)
        assert pieces[-1] == expected
        texts = [piece.text or "" for piece in pieces]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_banned_and_favoured_tokens(llm: LLM, plain: CompletionOutput) -> None:
    first, second = plain.token_ids[:2]
    assert ask(llm, bad_words_ids=[[first]]).token_ids[0] != first
    answer = ask(llm, bad_words_ids=[[first, second]]).token_ids
    assert answer[0] == first
    assert answer[1] != second
    assert set(ask(llm, logit_bias={"7": 100.0}).token_ids) == {7}
    assert plain.text is not None
    word = plain.text.split()[1]
    assert word not in (ask(llm, bad_words=[word]).text or "").split()


def test_logprobs_agree_with_the_logits(llm: LLM) -> None:
    prompt = "The little dog went to the park and"
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (result,) = llm.generate(prompt, params, prompt_logits=True)
    (output,) = result.outputs
    assert result.prompt_logits is not None
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    expected = result.prompt_logits.log_softmax(dim=1)
    for position, row in enumerate(result.prompt_logprobs[1:]):
        assert row is not None
        top = expected[position].topk(2).indices.tolist()
        assert set(row) == {result.prompt_token_ids[position + 1], *top}
        for token, entry in row.items():
            assert entry.logprob == pytest.approx(float(expected[position, token]), abs=1e-5)
            assert entry.rank == 1 + int((expected[position] > expected[position, token]).sum())
    assert output.logprobs is not None
    assert [next(iter(row)) for row in output.logprobs] == list(output.token_ids)
    assert [row[token].rank for token, row in zip(output.token_ids, output.logprobs, strict=True)] == [1] * 6
    # What the engine says about its answer is what it says about the same tokens in a prompt.
    longer = [*result.prompt_token_ids, *output.token_ids]
    (again,) = llm.generate(longer, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert again.prompt_logprobs is not None
    rows = zip(longer[-6:], again.prompt_logprobs[-6:], strict=True)
    total = sum(row[token].logprob for token, row in rows if row)
    assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert math.isfinite(total)


def test_parallel_samples_share_their_prompt_and_have_seeds_of_their_own(llm: LLM) -> None:
    prompt = [(7 * i) % 2000 + 3 for i in range(100)]
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=3, n=4)
    before = llm.stats()["reused_tokens"]
    (result,) = llm.generate([prompt], params)
    assert llm.stats()["reused_tokens"] - before == 3 * 96
    (alone,) = llm.generate([prompt], params.samples()[0])
    (again,) = llm.generate([prompt], params)

    async def last() -> RequestOutput:
        return [output async for output in llm.generate_async(prompt, params)][-1]

    streamed = asyncio.run(last())
    assert [output.index for output in result.outputs] == [0, 1, 2, 3]
    assert len({output.token_ids for output in result.outputs}) == 4
    assert result.outputs == again.outputs == streamed.outputs
    assert result.outputs[0] == alone.outputs[0]


def test_what_needs_a_tokenizer_or_lies_outside_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="logit_bias has token id 2048, outside the vocabulary of 2048"):
        ask(llm, logit_bias={2048: 1.0})
    with pytest.raises(ConfigError, match="bad_words_ids has token id 2049"):
        ask(llm, bad_words_ids=[[3, 2049]])


def test_the_command_line_has_the_options_and_adds_keys_only_when_asked(engine: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "logprobs": 2, "prompt_logprobs": 1, "logit_bias": {"7": 100}, "max_tokens": 3},
        {"prompt": PROMPT, "n": 2, "temperature": 1.0, "seed": 1, "stop": ["a"], "max_tokens": 30},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    check_cli(
        "run", "--engine-dir", engine, "--input-file", tmp_path / "in.jsonl", "--output-json", tmp_path / "out.json",
        "--tokenizer-dir", EXAMPLE, "--stop", " ", "--max-new-tokens", "20",
    )  # fmt: skip
    first, second, third = json.loads((tmp_path / "out.json").read_text())["outputs"]
    assert set(first) == {"input_ids", "output_ids", "text", "finish_reason", "stop_reason"}
    assert first["stop_reason"] == " "
    assert " " not in first["text"]
    assert first["finish_reason"] == "stop"
    assert second["output_ids"] == [7, 7, 7]
    assert [entry["token_id"] for entry in second["logprobs"]] == [7, 7, 7]
    assert all(2 <= len(entry["top"]) <= 3 for entry in second["logprobs"])
    assert second["cumulative_logprob"] == pytest.approx(sum(entry["logprob"] for entry in second["logprobs"]))
    assert second["prompt_logprobs"][0] is None
    assert len(second["prompt_logprobs"]) == len(second["input_ids"])
    assert len(third["samples"]) == 2
    assert all("a" not in sample["text"] for sample in third["samples"])
    assert third["output_ids"] == third["samples"][0]["output_ids"]


def test_lines_of_the_wrong_type_are_named(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "temperature": "hot", "top_k": true}\n')
    line = refusal("run", "--engine-dir", engine, "--input-file", tmp_path / "in.jsonl")
    assert "in.jsonl:2: sampling options: " in line
    assert "temperature is 'hot', expected a number" in line
    assert "top_k is True, expected a whole number" in line


AMBIGUOUS = "start: e\ne: e e | e e e | e e e e | f f | /[a-z ]/\nf: e e | f f | /[a-z ]/"


def test_a_request_that_fails_leaves_its_company_alone(llm: LLM, plain: CompletionOutput) -> None:
    """One that fails in mid-answer, and some that are refused, in batches with others."""

    async def last(**options: Any) -> CompletionOutput:
        params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **options})
        answer = None
        async for output in llm.generate_async(PROMPT, params):
            answer = output.outputs[0]
        assert answer is not None
        return answer

    async def together() -> list[CompletionOutput | BaseException]:
        hostile: list[dict[str, Any]] = [{"guided_grammar": AMBIGUOUS}, {"guided_regex": "("}]
        questions = [last(), *(last(**options) for options in hostile), last()]
        return await asyncio.gather(*questions, return_exceptions=True)

    first, ambiguous, malformed, second = asyncio.run(together())
    assert first == second == plain
    assert isinstance(ambiguous, ConfigError)
    assert "the grammar is too ambiguous to follow" in str(ambiguous)
    assert isinstance(malformed, ConfigError)
    assert "guided_regex is not valid" in str(malformed)
    with pytest.raises(ConfigError, match=r"repetition_penalty is 1e-39, expected 0.01 to 100"):
        ask(llm, repetition_penalty=1e-39)
    with pytest.raises(ConfigError, match=r"stop_token_ids is .*, expected a list of token ids"):
        ask(llm, stop_token_ids=[-1_000_000], min_tokens=3)
    assert ask(llm) == plain
    assert llm.stats()["kv_blocks_used"] == 0
