"""What the HTTP front lets through to Triton."""

from __future__ import annotations

import json

import pytest

from pt_trtllm.errors import ConfigError
from pt_trtllm.serving.front.app import ASK, CLOSED, METRICS, READ
from pt_trtllm.serving.front.checks import MAX_DEPTH, check_body

pytestmark = pytest.mark.unit


def shaped(*shape: object) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": list(shape), "datatype": "INT32", "data": [1]}]}).encode()


@pytest.mark.parametrize(
    ("body", "json_length", "message"),
    [
        (b"", None, "is not JSON"),
        (b"{", None, "is not JSON"),
        (b"\xff\xfe[\0", None, "is not JSON"),
        (b"[" * 100_000, None, "nested"),
        (b'{"a":' * 100_000, None, "nested"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), None, "nested"),
        (b"1" * 5000, None, "is not JSON"),
        (shaped(1 << 33), None, "can hold"),
        (shaped(1 << 32, 1 << 32), None, "can hold"),
        (shaped(-1), None, "can hold"),
        (shaped(0, 1 << 62), None, "can hold"),
        (shaped(*[1] * 17), None, "can hold"),
        (b"{}", "3", "expected 0 to 2"),
        (b"{}", "-1", "expected 0 to 2"),
        (b"{}", "\u0662", "expected 0 to 2"),
        (b"{}", "1000000000000", "expected 0 to 2"),
        (b"{]\0\0", "2", "is not JSON"),
        (shaped(1 << 33)[:-1] + b', "inputs": []}', None, "the same name twice"),
        (b'{"inputs": [{"shape": [8589934592], "data": [1], "sh\\u0061pe": [1]}]}', None, "the same name twice"),
    ],
)
def test_what_triton_may_not_read(body: bytes, json_length: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_body(body, json_length)


@pytest.mark.parametrize(
    ("body", "json_length"),
    [
        (b"{}", None),
        (b"{}\xff\xff", "2"),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, None),
        (b"3", None),
        (shaped(1, 1), None),
        (shaped(1, 0), None),
        (shaped("one", 1.5), None),
        (b'{"inputs": 3}', None),
        (b'{"inputs": [3, {"shape": 5}]}', None),
    ],
)
def test_what_triton_may_judge_itself(body: bytes, json_length: str | None) -> None:
    check_body(body, json_length)


@pytest.mark.parametrize(
    "path",
    ["/v2/models/x/../../repository/index", "/v2/models/a%2fb", "/v2//repository/index", "/v2/models/x/trace/setting",
     "/v2/models/x/infer/", "/v2/models/x\n", "/v3", "/"],
)  # fmt: skip
def test_paths_for_nobody(path: str) -> None:
    assert not any(pattern.fullmatch(path) for pattern in (ASK, READ, METRICS))


def test_paths_for_clients() -> None:
    for path in ("/v2", "/v2/health/live", "/v2/models/ensemble", "/v2/models/a-b.c/versions/12/config"):
        assert READ.fullmatch(path)
    for path in ("/v2/models/ensemble/generate_stream", "/v2/models/ensemble/versions/1/infer"):
        assert ASK.fullmatch(path)
    for path in ("/v2/logging", "/v2/trace/setting", "/v2/models/m/trace/setting", "/v2/systemsharedmemory/status"):
        assert CLOSED.fullmatch(path)
