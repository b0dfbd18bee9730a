"""What clients of the OpenAI endpoint may ask, and what they are told when they may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_trtllm.openai.errors import ApiError
from pt_trtllm.openai.model import check_logprobs
from pt_trtllm.openai.requests import CHAT, COMPLETION, parse_chat, parse_completion
from pt_trtllm.openai.tensors import bias_values, sampling_values, to_inputs, word_list
from pt_trtllm.runtime.params import SamplingParams

pytestmark = pytest.mark.unit

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_a_prompt_is_text_or_tokens_one_or_many(prompt: Any, expected: Any) -> None:
    assert parse_completion({"prompt": prompt}).prompts == expected


def test_defaults_are_openais() -> None:
    question = parse_completion({"prompt": "a"})
    assert (question.max_tokens, question.n, question.stream, question.logprobs) == (16, 1, False, None)
    assert question.params.temperature == 1.0
    assert not question.params.is_greedy
    assert parse_chat({"messages": MESSAGES}).max_tokens is None


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    fields = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs", "stream_options", "max_tokens")
    assert parse_completion({"prompt": "a", **dict.fromkeys(fields)}) == parse_completion({"prompt": "a"})


def test_max_completion_tokens_wins_over_its_former_name() -> None:
    question = parse_chat({"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 7})
    assert (question.max_tokens, question.params.max_tokens) == (7, 7)


def test_content_may_come_in_parts_and_developers_are_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": None, "name": "x"}]
    assert parse_chat({"messages": messages}).messages == (
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "", "name": "x"},
    )


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            ("json_schema", '{"type": "object"}'),
        ),
        ({"guided_json": {"type": "string"}}, ("json_schema", '{"type": "string"}')),
        ({"guided_json": '{"type": "string"}'}, ("json_schema", '{"type": "string"}')),
        ({"guided_regex": "[a-z]+"}, ("regex", "[a-z]+")),
        ({"guided_grammar": "root ::= 'a'"}, ("ebnf_grammar", "root ::= 'a'")),
    ],
)
def test_what_an_answer_must_match_becomes_a_guide(fields: dict[str, Any], guide: Any) -> None:
    assert parse_chat({"messages": MESSAGES, **fields}).guide == guide


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": []}, "prompt", "none of them empty"),
        ({"prompt": [1, "a"]}, "prompt", "expected a string"),
        ({"prompt": [[1], []]}, "prompt", "none of them empty"),
        ({"prompt": 5}, "prompt", "prompt is 5"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot', expected a number"),
        ({"temperature": True}, "temperature", "expected a number"),
        ({"temperature": -1}, None, "temperature is -1"),
        ({"top_p": 1.5}, None, "top_p is 1.5"),
        ({"top_k": 1.5}, "top_k", "expected a whole number"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, expected 1"),
        ({"max_tokens": 1 << 40}, "max_tokens", "expected 1 to 2147483647"),
        ({"n": 0}, "n", "n is 0, expected 1 to 128"),
        ({"prompt": ["a"] * 256, "n": 5}, "n", "256 prompts with n = 5 are 1280 answers, expected at most 1024"),
        ({"prompt": ["a"] * 257}, "prompt", "prompt has 257 entries, expected at most 256"),
        ({"best_of": 3}, "best_of", "best_of is 3"),
        ({"suffix": "b"}, "suffix", "suffix is not supported"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21, expected 0 to 20"),
        ({"logprobs": True}, "logprobs", "expected a whole number"),
        ({"logit_bias": {"x": 1}}, None, "logit_bias"),
        ({"logit_bias": {"1": 200}}, None, "logit_bias"),
        ({"stop": [1]}, "stop", "expected a string or a list of strings"),
        ({"stop": ["a", ""]}, None, "stop has an empty string"),
        ({"seed": -1}, None, "seed is -1"),
        ({"stream": "yes"}, "stream", "expected true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "include_usage is 1"),
        ({"response_format": {"type": "yaml"}}, "response_format", "'yaml'"),
        ({"guided_regex": "a", "guided_grammar": "b"}, "response_format", "2 things at once"),
        ({"temprature": 1}, "temprature", "Unrecognized request argument supplied: temprature"),
    ],
)
def test_a_wrong_completion_is_refused_by_name(change: dict[str, Any], param: str | None, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"prompt": "a", **change})
    body = caught.value.body()["error"]
    assert (caught.value.status, body["type"], body["param"]) == (400, "invalid_request_error", param)
    assert says in body["message"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages is missing or empty"),
        ({"messages": "Hi"}, "expected a list"),
        ({"messages": ["Hi"]}, "messages[0] is 'Hi', expected an object"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role is 'wizard'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content[0] is 'image_url'"),
        ({"tools": [{"type": "function"}]}, "tools are not supported"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "which the request itself decides"),
    ],
)
def test_a_wrong_chat_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({"messages": MESSAGES, **change})
    assert says in str(caught.value)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [None, 5, "text", [1]])
def test_a_body_must_be_an_object(body: Any) -> None:
    with pytest.raises(ApiError, match="expected a JSON object"):
        parse_completion(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), parse=st.sampled_from([(parse_completion, COMPLETION), (parse_chat, CHAT)]))
def test_whatever_is_sent_is_taken_or_refused(data: st.DataObject, parse: Any) -> None:
    function, kinds = parse
    body = data.draw(st.dictionaries(st.sampled_from(sorted(kinds)), JSON, max_size=4))
    valid = {"prompt": "a"} if kinds is COMPLETION else {"messages": MESSAGES}
    told: Any
    try:
        told = sampling_values(function({**valid, **body}).params)
    except ApiError as error:
        told = error.body()
    json.dumps(told)


def test_refusals_stay_short_and_can_be_sent() -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"prompt": "a", "temperature": "x" * 10_000_000})
    assert len(json.dumps(caught.value.body())) < 1000


def test_sampling_becomes_tensors_and_defaults_are_left_out() -> None:
    assert sampling_values(SamplingParams(temperature=0.0, seed=3)) == {"seed": 3, "runtime_top_k": 1}
    assert sampling_values(SamplingParams(temperature=0.5, top_k=4, min_p=0.1, presence_penalty=1.0, seed=3)) == {
        "seed": 3, "temperature": 0.5, "runtime_top_p": 1.0, "runtime_top_k": 4, "min_p": 0.1, "presence_penalty": 1.0,
    }  # fmt: skip
    ended = sampling_values(SamplingParams(ignore_eos=True, stop_token_ids=(7, 9)))
    assert (ended["end_id"], ended["stop_words_list"]) == (-1, [[7, 9], [1, 2]])


def test_without_a_seed_every_request_draws_its_own() -> None:
    seeds = {sampling_values(SamplingParams(temperature=1.0))["seed"] for _ in range(20)}
    assert len(seeds) == 20


@pytest.mark.parametrize(("name", "value"), [("runtime_top_k", 1 << 40), ("stop_words_list", [[1 << 70], [1]])])
def test_a_number_that_no_tensor_holds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ApiError, match="beyond what the server's INT32 holds"):
        to_inputs({name: value}, {name: "INT32"}, "core")


def test_values_become_tensors_with_a_batch_dimension() -> None:
    declared = {
        "seed": "UINT64", "input_ids": "INT32", "streaming": "BOOL", "stop_words": "BYTES", "top_p": "FP32",
        "guide": "BYTES",
    }  # fmt: skip
    values = {
        "seed": (1 << 64) - 1, "input_ids": (1, 2), "streaming": True, "stop_words": ("ü", "b"), "top_p": 0.5,
        "guide": "ab",
    }  # fmt: skip
    shapes = {tensor.name(): (tensor.datatype(), tensor.shape()) for tensor in to_inputs(values, declared, "core")}
    assert shapes == {
        "seed": ("UINT64", [1, 1]), "input_ids": ("INT32", [1, 2]), "streaming": ("BOOL", [1, 1]),
        "stop_words": ("BYTES", [1, 2]), "top_p": ("FP32", [1, 1]), "guide": ("BYTES", [1, 1]),
    }  # fmt: skip
    with pytest.raises(ApiError, match="min_p is not supported: the server's model 'core' has no input 'min_p'"):
        to_inputs({"min_p": 0.1}, declared, "core")


def test_word_lists_have_all_ids_and_then_the_ends() -> None:
    assert word_list([[1, 2, 3], [4]]) == [[1, 2, 3, 4], [3, 4, -1, -1]]


def test_a_bias_has_a_place_for_every_token() -> None:
    assert bias_values({1: -100.0, 3: 2.0}, 4).tolist() == [0.0, -100.0, 0.0, 2.0]
    with pytest.raises(ApiError, match="token 4, outside the vocabulary of 4"):
        bias_values({4: 1.0}, 4)


def test_a_whole_answer_has_a_limit_of_log_probabilities() -> None:
    whole, streamed = ({"prompt": "a", "logprobs": 20, "stream": stream} for stream in (False, True))
    check_logprobs(parse_completion(whole), 199_000)
    check_logprobs(parse_completion(streamed), 10**9)
    check_logprobs(parse_completion({"prompt": "a"}), 10**9)
    with pytest.raises(ApiError, match="200000 tokens with 20 log-probabilities each are more than 4194304"):
        check_logprobs(parse_completion(whole), 200_000)
