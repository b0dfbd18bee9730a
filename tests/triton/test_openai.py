"""The OpenAI endpoint in front of a real Triton server, asked by the real `openai` package."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.cli import refusal
from pt_trtllm.testing.front_end import FrontEnd, front_end
from pt_trtllm.testing.triton import wait_until_quiet

pytestmark = pytest.mark.triton

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
MODEL = "tiny-pt"
CASES = json.loads((EXAMPLE / "reference.json").read_text())["cases"]
MESSAGES: Any = [{"role": "user", "content": "What is a truth?"}]
NUM_LONG, ATTEMPTS = 480, 10
"""Tokens of answers that are left, and times to try: now and then they end by themselves before."""
ACTIVE = 'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active"'
WAIT_S = 240.0


@pytest.fixture(scope="module")
def front(openai_front_end: FrontEnd) -> FrontEnd:
    return openai_front_end


@pytest.fixture(scope="module")
def api(front: FrontEnd) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{front.address}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def metric(front: FrontEnd, sample: str, default: float | None = None) -> float:
    """The sum over the samples that begin like this: a family, or a family with labels."""
    text = ""

    def is_whole() -> bool:
        nonlocal text
        with urllib.request.urlopen(f"{front.address}/metrics", timeout=WAIT_S) as response:
            text = response.read().decode()
        return "# Triton's metrics are missing" not in text

    until(is_whole)
    lines = text.splitlines()
    found = [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{re.escape(sample)}[ {{,}}]", line)]
    assert found or default is not None, f"no metric {sample}"
    return sum(found, default or 0.0)


def post(front: FrontEnd, path: str, data: bytes, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(front.address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def joined(stream: Any) -> tuple[str, str | None]:
    """The text and the finish reason of a streamed completion."""
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    reasons = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    assert len(reasons) == 1
    return "".join(chunk.text for chunk in chunks), reasons[0]


def test_there_is_one_model_and_others_are_404(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [MODEL]
    assert api.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        api.completions.create(model="gpt-99", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-99")


@pytest.mark.parametrize("case", CASES, ids=[case["prompt"] for case in CASES])
def test_greedy_text_is_that_of_the_reference_whole_and_streamed(api: openai.OpenAI, case: dict[str, Any]) -> None:
    count = len(case["output_ids"])
    options: Any = {"model": MODEL, "max_tokens": count, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = api.completions.create(prompt=case["prompt"], **options)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (case["text"], "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(case["input_ids"]), count)
    assert joined(api.completions.create(prompt=case["prompt"], stream=True, **options)) == (case["text"], "length")
    tokens = api.completions.create(prompt=case["input_ids"], **options)
    assert tokens.choices[0].text == case["text"]


def test_a_stream_gives_what_the_whole_gives(api: openai.OpenAI) -> None:
    for options in (
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5, "stop": [" and"]},
        {"extra_body": {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2}},
    ):
        ask: Any = {"model": MODEL, "prompt": "She had", "max_tokens": 20, "seed": 11, **options}
        whole = api.completions.create(**ask).choices[0]
        assert joined(api.completions.create(stream=True, **ask)) == (whole.text, whole.finish_reason)


def test_a_chat_streams_its_role_its_text_its_reason_and_its_usage(front: FrontEnd) -> None:
    body = {
        "model": MODEL, "messages": MESSAGES, "max_completion_tokens": 6, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    status, text = post(front, "/v1/chat/completions", json.dumps(body).encode())
    events = text.split("\n\n")
    assert (status, events[-2:]) == (200, ["data: [DONE]", ""])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1] if chunk["choices"][0]["finish_reason"]] == [
        "length"
    ]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 6)

    body |= {"stream": False, "stream_options": None}
    whole = json.loads(post(front, "/v1/chat/completions", json.dumps(body).encode())[1])
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": streamed, "refusal": None}
    assert whole["usage"] == chunks[-1]["usage"]


def test_a_chat_is_the_completion_of_its_transcript(api: openai.OpenAI) -> None:
    chat = api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    text = "\n\nUser: What is a truth?\n\nAssistant:".lstrip()
    plain = api.completions.create(model=MODEL, prompt=text, max_tokens=12, temperature=0, stop="\nUser:")
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage is not None
    assert plain.usage is not None
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens  # one beginning-of-text token, not two


def test_several_prompts_and_samples_come_in_order(api: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "max_tokens": 8, "seed": 5, "temperature": 1.0}
    both = api.completions.create(prompt=["It is", "She had"], n=2, **ask)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in both.choices}) == 4
    for place, prompt in ((0, "It is"), (2, "She had")):
        alone = api.completions.create(prompt=prompt, **ask)
        assert both.choices[place].text == alone.choices[0].text
    streamed = ["", ""]
    for chunk in api.completions.create(prompt="It is", n=2, stream=True, **ask):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in both.choices[:2]]
    assert both.usage is not None
    assert both.usage.completion_tokens == 32


def test_a_stop_string_ends_the_text_also_within_tokens(api: openai.OpenAI) -> None:
    case = CASES[0]
    stop = case["text"][20:26]
    ask: Any = {"model": MODEL, "prompt": case["prompt"], "max_tokens": 24, "temperature": 0, "stop": [stop, "never"]}
    whole = api.completions.create(**ask).choices[0]
    assert (whole.text, whole.finish_reason) == (case["text"][: case["text"].index(stop)], "stop")
    assert joined(api.completions.create(stream=True, **ask)) == (whole.text, "stop")


def test_a_bias_decides_between_tokens(api: openai.OpenAI) -> None:
    forced = Tokenizer(EXAMPLE).encode(" truth", add_special_tokens=False)
    assert len(forced) == 1
    answer = api.completions.create(
        model=MODEL, prompt="It is", max_tokens=3, temperature=0, logit_bias={str(forced[0]): 100}
    )
    assert answer.choices[0].text == " truth truth truth"


def test_log_probabilities_in_both_forms(api: openai.OpenAI) -> None:
    case = CASES[0]
    ask: Any = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    told = api.completions.create(prompt=case["prompt"], logprobs=3, **ask).choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.top_logprobs is not None
    assert told.token_logprobs is not None
    assert case["text"].startswith("".join(told.tokens))
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == max(top.values()) == value
        assert len(top) == 3
    streamed = list(api.completions.create(prompt=case["prompt"], logprobs=3, stream=True, **ask))
    pieces = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [token for piece in pieces for token in piece.tokens or []] == told.tokens
    assert [offset for piece in pieces for offset in piece.text_offset or []] == told.text_offset

    chat = api.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **ask).choices[0]
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    assert "".join(entry.token for entry in chat.logprobs.content) == chat.message.content
    for entry in chat.logprobs.content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_guided_answers_keep_to_their_guides(api: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "prompt": "Mr. ", "max_tokens": 60}
    matching = api.completions.create(**ask, extra_body={"guided_regex": "[A-Z][a-z]{2,6}, (17|18)[0-9]{2}"})
    assert re.fullmatch("[A-Z][a-z]{2,6}, (17|18)[0-9]{2}", matching.choices[0].text)
    schema = {"type": "object", "properties": {"kind": {"enum": ["man", "woman"]}}, "required": ["kind"]}
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "one", "schema": {**schema, "additionalProperties": False}},
    }
    chat = api.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Who?"}], max_tokens=60, response_format=wanted
    )
    assert json.loads(str(chat.choices[0].message.content))["kind"] in ("man", "woman")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": [1] * 600}, "you requested 604 tokens (600 in the prompt, 4 in the completion)"),
        ({"max_tokens": 511}, "This model's maximum context length is 512 tokens"),
        ({"prompt": "word " * 10**6}, "This model's maximum context length is 512 tokens"),
        ({"prompt": ["a"] * 256, "n": 128}, "256 prompts with n = 128 are 32768 answers, expected at most 1024"),
        ({"prompt": [999999]}, "outside the vocabulary"),
        ({"prompt": ""}, None),
        ({"logit_bias": {"99999": 1}}, "outside the vocabulary"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs is not supported"),
        ({"extra_body": {"repetition_penalty": 1e-39}}, "repetition_penalty is 1e-39, expected 0.01 to 100"),
        ({"extra_body": {"stop_token_ids": [-1_000_000], "min_tokens": 3}}, "stop_token_ids is [-1000000]"),
        ({"stop": [str(number) for number in range(65)]}, "stop has 65 entries, expected at most 64"),
        ({"extra_body": {"guided_regex": "["}}, "guided_regex is not valid"),
        ({"extra_body": {"beams": 4}}, "Unrecognized request argument supplied: beams"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_400_and_say_why(
    api: openai.OpenAI, change: dict[str, Any], says: str | None, stream: bool
) -> None:
    ask: Any = {"model": MODEL, "prompt": "a", "max_tokens": 4, "stream": stream, **change}
    if says is None:  # an empty text still has its beginning-of-text token
        assert api.completions.create(**ask)
        return
    with pytest.raises(openai.BadRequestError, match=re.escape(says)):
        api.completions.create(**ask)


def test_an_echo_repeats_the_prompt_and_may_be_all_there_is(api: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "prompt": "It is a truth", "temperature": 0, "echo": True}
    whole = api.completions.create(max_tokens=4, **ask).choices[0].text
    assert whole == "It is a truth of the world."
    assert joined(api.completions.create(max_tokens=4, stream=True, **ask)) == (whole, "length")
    assert api.completions.create(max_tokens=0, **ask).choices[0].text == "It is a truth"


def test_a_full_queue_is_429_and_what_was_taken_is_given_back(front: FrontEnd, api: openai.OpenAI) -> None:
    """32 run and 64 wait at most."""
    ask: Any = {"model": MODEL, "prompt": "It is", "max_tokens": NUM_LONG, "extra_body": {"ignore_eos": True}}

    async def fill() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{front.address}/v1", api_key="none", max_retries=0, timeout=WAIT_S
        ) as many:
            asks = [asyncio.create_task(many.completions.create(**ask)) for _ in range(160)]
            try:
                for ended in asyncio.as_completed(asks):
                    await ended
            finally:
                for one in asks:
                    one.cancel()
                await asyncio.gather(*asks, return_exceptions=True)

    with pytest.raises(openai.RateLimitError, match="Exceeds maximum queue size") as caught:
        asyncio.run(fill())
    assert caught.value.response.headers["Retry-After"] == "1"

    def is_taken() -> bool:
        try:
            return api.completions.create(model=MODEL, prompt="It is", max_tokens=2).usage is not None
        except openai.RateLimitError:
            return False

    until(is_taken)
    until(lambda: metric(front, ACTIVE) == 0)


def test_one_request_may_have_more_answers_than_the_queue_has_places(front: FrontEnd, api: openai.OpenAI) -> None:
    """256 of them, and who asks meanwhile is answered."""
    ask: Any = {"model": MODEL, "prompt": ["It is", "She had"] * 64, "n": 2, "max_tokens": 2, "seed": 1}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(api.completions.create, **ask)
        lives = []
        while not asked.done():
            with urllib.request.urlopen(f"{front.address}/health/live", timeout=WAIT_S) as response:
                lives.append(response.status)
            time.sleep(0.02)
    choices = asked.result().choices
    assert [choice.index for choice in choices] == list(range(256))
    assert {choice.text for choice in choices[:4]} == {choice.text for choice in choices[-4:]}
    assert set(lives) == {200}


def test_a_chat_without_a_limit_may_go_on_to_the_end_of_the_engines_context(
    front: FrontEnd, api: openai.OpenAI
) -> None:
    """512 tokens, which only the engine knows: the tokenizer's folder says nothing, or more."""
    (model,) = api.models.list()
    assert model.model_dump()["max_model_len"] == 512
    chat = api.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"ignore_eos": True}, stop=[])
    assert chat.usage is not None
    assert chat.choices[0].finish_reason == "stop" or chat.usage.total_tokens == 512
    with pytest.raises(openai.BadRequestError, match=r"in the messages, 505 in the completion") as caught:
        api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=505)
    assert caught.value.code == "context_length_exceeded"


def test_what_is_no_request_at_all(front: FrontEnd) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert post(front, "/v1/completions", b"{", **{"X-Request-Id": "mine"})[0] == 400
    assert post(front, "/v1/completions", body, **{"Content-Type": "text/plain"})[0] == 415
    for wrong in (
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stop": ["\\udc00"]}',
        b'{"prompt": "a", "top_p": 1e400}',
    ):
        assert post(front, "/v1/completions", wrong)[0] == 400
    deep = b'{"prompt": "a", "response_format": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001
    assert "nested too deeply" in post(front, "/v1/completions", deep)[1]["error"]["message"]
    for kind in ("foo", "latin-1", '"'):
        status, told = post(front, "/v1/completions", body, **{"Content-Type": f"application/json; charset={kind}"})
        assert (status, told["error"]["type"]) == (415, "invalid_request_error")
    assert post(front, "/v1/completions", body, **{"Content-Encoding": "gzip"})[0] == 415
    assert post(front, "/v1/nothing", body)[0] == 404
    assert post(front, "/v1/models", body)[0] == 405
    assert post(front, "/v1/completions", b" " * (17 << 20))[0] == 413
    assert post(front, "/v1/completions", body)[0] == 200
    assert '"request_id": "mine"' in front.log.read_text()


def test_every_reply_names_its_request_streams_too(front: FrontEnd) -> None:
    for stream in (False, True):
        body = json.dumps({"prompt": "a", "max_tokens": 1, "stream": stream}).encode()
        headers = {"Content-Type": "application/json", "X-Request-Id": f"mine-{stream}"}
        request = urllib.request.Request(f"{front.address}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            assert response.headers["X-Request-Id"] == f"mine-{stream}"


def test_many_clients_at_once_get_their_own_answers(front: FrontEnd) -> None:
    async def ask_all() -> None:
        async with openai.AsyncOpenAI(base_url=f"{front.address}/v1", api_key="none", timeout=WAIT_S) as api:

            async def ask(index: int, stream: bool) -> str:
                options: Any = {
                    "model": MODEL, "seed": index, "prompt": ["It is", "She had", "The evening"][index % 3],
                    "temperature": index % 4 * 0.4, "max_tokens": 4 + index % 9,
                    "stop": [" the"] if index % 5 else None,
                }  # fmt: skip
                if not stream:
                    return (await api.completions.create(**options)).choices[0].text
                pieces = [piece async for piece in await api.completions.create(stream=True, **options)]
                return "".join(piece.choices[0].text for piece in pieces)

            streamed = await asyncio.gather(*(ask(index, True) for index in range(32)))
            for index in (0, 7, 13, 22, 31):
                assert streamed[index] == await ask(index, False)

    asyncio.run(ask_all())
    until(lambda: metric(front, "pt_openai_requests_in_flight") == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(front: FrontEnd, server: TritonServer, stream: bool) -> None:
    """Long answers that nobody waits for are not computed: the engine ends each of them as cancelled."""
    host, port = front.address.removeprefix("http://").split(":")
    fields = {"prompt": "It is", "max_tokens": NUM_LONG, "n": 8, "seed": 1, "ignore_eos": True, "stream": stream}
    body = json.dumps(fields).encode()
    lines = ("POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json")
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
    shown, left = "pt_openai_generation_tokens_total", 'pt_openai_requests_total{status="499"}'
    cancelled = 'pt_requests_total{finish_reason="cancelled"'
    found = []
    for _ in range(ATTEMPTS):
        before = {name: metric(front, name, default=0) for name in (shown, left, cancelled)}
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda at=before[shown]: metric(front, shown) > at)
        until(lambda: metric(front, "pt_openai_requests_in_flight") == 0)
        wait_until_quiet(server, "what was left has ended")
        found.append([metric(front, name, default=0) - before[name] for name in (left, cancelled)])
        if found[-1] == [1, 8]:
            return
    pytest.fail(f"requests that were left, and answers cancelled: {found}, expected 1 and 8 once")


def until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "never became true"
        time.sleep(0.02)


def test_health_and_the_servers_own_metrics_pass_through(front: FrontEnd) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        with urllib.request.urlopen(front.address + path, timeout=WAIT_S) as response:
            assert response.status == 200
    assert metric(front, "nv_inference_request_success") > 0
    assert metric(front, "pt_openai_time_to_first_token_seconds_count") > 0


def test_told_to_stop_it_lets_answers_end(server: TritonServer) -> None:
    with front_end("--url", server.grpc_url, "--tokenizer-dir", EXAMPLE, "--served-model-name", MODEL) as front:
        api = openai.OpenAI(base_url=f"{front.address}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
        ask: Any = {"model": MODEL, "prompt": "It is", "max_tokens": 100, "temperature": 0}
        stream = api.completions.create(stream=True, extra_body={"ignore_eos": True}, **ask)
        next(stream)
        codes: list[int] = []
        stopper = threading.Thread(target=lambda: codes.append(front.stop()))
        stopper.start()
        assert joined(stream)[1] == "length"
        stopper.join(WAIT_S)
        assert codes == [0]


def test_without_a_server_behind_it_says_so() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"
        with front_end("--url", url, "--tokenizer-dir", EXAMPLE) as front:
            status, answer = post(front, "/v1/completions", b'{"prompt": "a"}')
            assert (status, answer["error"]["type"]) == (503, "server_error")
            assert f"no Triton server answers at {url}" in answer["error"]["message"]
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{front.address}/health", timeout=WAIT_S)
            with urllib.request.urlopen(f"{front.address}/metrics", timeout=WAIT_S) as response:
                assert b"Triton's metrics are missing" in response.read()
            port = front.address.rpartition(":")[2]
            taken = refusal("openai", "--tokenizer-dir", EXAMPLE, "--url", url, "--port", port, code=1)
            assert f"cannot listen on 127.0.0.1:{port}" in taken


def test_the_command_refuses_what_cannot_work(tmp_path: Path) -> None:
    assert "no tokenizer.json" in refusal("openai", "--tokenizer-dir", tmp_path)
    assert "expected HOST:PORT" in refusal("openai", "--tokenizer-dir", EXAMPLE, "--url", "http://localhost:8001/")
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    assert "not a chat template" in refusal("openai", "--tokenizer-dir", EXAMPLE, "--chat-template", broken)
