"""Whatever is sent to the OpenAI endpoint is answered, or refused with one line that says why; never with a 5xx."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pt_trtllm.openai.requests import CHAT, COMPLETION
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.front_end import FrontEnd
from pt_trtllm.testing.triton import wait_until_quiet

pytestmark = pytest.mark.triton

BATCH, EXAMPLES = 50, 10
MESSAGES = [{"role": "user", "content": "Hi"}]
TYPES = ["application/json"] * 9 + [
    "application/json; charset=utf-8", "application/json; charset=foo", "application/json; charset=utf-16",
    "application/json; charset=\u00fc", "text/json", "application/json; charset=", "",
]  # fmt: skip


def nested(depth: int, spelling: str) -> str:
    start, end = ("[", "]") if spelling == "list" else ('{"a": ', "}")
    return start * depth + "1" + end * depth


raw = st.sampled_from([
    "1e400", "-1e400", "NaN", "-Infinity", "9" * 400, "9" * 9999, "18446744073709551615", "-9223372036854775808",
    "1e300", "2147483648", "1.5", '"\\ud800"', '["\\udfff"]', '{"\\udc00": 1}', '"\\u0000"', '""', "[]", "{}", '[""]',
    '"\\n\\nUser:"', "[[1], [2]]", '{"1": 1}', '{"99999999999": 1}', '{"a": {"$ref": "#"}}',
    '{"type": "json_schema"}', '{"type": "json_object"}', '{"include_usage": true}',
    '[{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]',
])  # fmt: skip
deep = st.builds(nested, st.sampled_from([50, 127, 128, 129, 3000, 10**5]), st.sampled_from(["list", "object"]))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats(width=16) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
).map(json.dumps)
value = plain | raw | deep


@st.composite
def body(draw: st.DrawFn) -> tuple[str, bytes]:
    """(endpoint, text): a sound request with a few fields that are not."""
    path, kinds = draw(st.sampled_from([("completions", COMPLETION), ("chat/completions", CHAT)]))
    fields = {"prompt": '"It is"'} if kinds is COMPLETION else {"messages": json.dumps(MESSAGES)}
    fields |= {"max_tokens": "2", "temperature": draw(st.sampled_from(["0", "1.5"]))}
    names = st.sampled_from(sorted(kinds)) | st.text(max_size=3)
    fields |= draw(st.dictionaries(names, value, max_size=2))
    text = "{" + ", ".join(f"{json.dumps(name)}: {written}" for name, written in fields.items()) + "}"
    cut = draw(st.sampled_from([None] * 9 + [len(text) // 2]))
    return path, text.encode()[:cut] + draw(st.sampled_from([b""] * 9 + [b"\xff", b"]"]))


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(bodies=st.lists(st.tuples(body(), st.sampled_from(TYPES)), min_size=BATCH, max_size=BATCH))
def test_bodies(openai_front_end: FrontEnd, bodies: list[tuple[tuple[str, bytes], str]]) -> None:
    def send(asked: tuple[tuple[str, bytes], str]) -> tuple[int, str]:
        (path, data), kind = asked
        request = urllib.request.Request(f"{openai_front_end.address}/v1/{path}", data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=90) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with ThreadPoolExecutor(16) as pool:
        for asked, (status, text) in zip(bodies, pool.map(send, bodies), strict=True):
            assert status in (200, 400, 413, 415), (asked, status, text)
            if status != 200:
                message = json.loads(text)["error"]["message"]
                assert message, asked
                assert "\n" not in message, (asked, message)
                assert len(message) < 1000, (asked, message)
    assert openai_front_end.process.poll() is None


def test_afterwards_nothing_is_left(openai_front_end: FrontEnd, server: TritonServer) -> None:
    wait_until_quiet(server, "what was fuzzed has ended")
    assert "Traceback" not in openai_front_end.log.read_text()
    assert server.poll() is None
