"""Every sampling option that the server has an input for can be sent with our client, and means what `run` means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pt_trtllm import LLM, SamplingParams
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.cli import check_cli

pytestmark = pytest.mark.triton

PROMPT = "It is a truth"
SCHEMA = json.dumps({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
OPTIONS = {
    "json": SamplingParams(max_tokens=40, guided_json=SCHEMA),
    "any_json": SamplingParams(max_tokens=40, guided_json="{}"),
    "regex": SamplingParams(max_tokens=12, guided_regex=" [0-9]{3}-[a-z]{2}"),
    "grammar": SamplingParams(max_tokens=12, guided_grammar='start: " yes" | " no"'),
    "choice": SamplingParams(max_tokens=12, guided_choice=(' the "first"', " zweitä")),
    "bias": SamplingParams(max_tokens=8, logit_bias={300: 100.0, 301: -5.5}),
    "banned_ids": SamplingParams(max_tokens=12, bad_words_ids=((284, 269), (304,)), bad_words=("world",)),
    "stopped_by_ids": SamplingParams(max_tokens=24, stop_token_ids=(16, 741), stop=(" never said",)),
    "kept": SamplingParams(max_tokens=24, stop=("I am sure",), include_stop_str_in_output=True),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_options_reach_the_engine(server: TritonServer, llm: LLM, model: str, name: str) -> None:
    expected = llm.generate(PROMPT, OPTIONS[name])[0].outputs[0]
    assert expected.text != llm.generate(PROMPT, SamplingParams(max_tokens=24))[0].outputs[0].text
    with Client(server.grpc_url, model=model) as client:
        found = client.generate(PROMPT, OPTIONS[name])
        assert (found.text, found.token_ids, found.finish_reason) == (
            expected.text, expected.token_ids, expected.finish_reason,
        )  # fmt: skip
        ids = llm.generate(PROMPT, SamplingParams(max_tokens=1))[0].prompt_token_ids
        assert client.generate(ids, OPTIONS[name]).token_ids == expected.token_ids


def test_bad_ones_are_refused_with_the_engines_reason(client: Client) -> None:
    for params, message in (
        (SamplingParams(guided_regex="(("), "guided_regex is not valid"),
        (SamplingParams(logit_bias={10**6: 1.0}), "logit_bias has token id 1000000, outside the vocabulary"),
        (SamplingParams(prompt_logprobs=1), "no input for prompt_logprobs"),
    ):
        with pytest.raises(ServingError, match=message.replace("(", r"\(")):
            client.generate(PROMPT, params)


def test_the_command_line_has_them_too(server: TritonServer, llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    for args, params in (
        (("--guided-json", f"@{tmp_path / 'schema.json'}"), OPTIONS["json"]),
        (("--guided-choice", " yes", "--guided-choice", " no"), SamplingParams(guided_choice=(" yes", " no"))),
        (("--logit-bias", '{"300": 100}'), SamplingParams(logit_bias={300: 100})),
        (("--stop-token-id", 741), SamplingParams(stop_token_ids=(741,))),
    ):
        expected = llm.generate(PROMPT, params)[0].outputs[0].text
        asked = ("--url", server.grpc_url, "--prompt", PROMPT, "--max-tokens", params.max_tokens)
        assert check_cli("client", *asked, *args).stdout == f"{expected}\n"
