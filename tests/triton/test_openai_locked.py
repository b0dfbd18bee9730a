"""The front end behind API keys and TLS."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from pt_trtllm.openai.server import tls_context
from pt_trtllm.testing.cli import refusal
from pt_trtllm.testing.front_end import API_KEYS, FrontEnd, front_end
from pt_trtllm.testing.triton import EXAMPLE

pytestmark = pytest.mark.triton

MODEL = "tiny-pt"
NOWHERE = ("--url", "127.0.0.1:9", "--tokenizer-dir", EXAMPLE)
WAIT_S = 90.0


def ask(front: FrontEnd, path: str, key: str | None, body: bytes | None = None) -> tuple[int, Any, Any]:
    """(status, headers, body)"""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(
            urllib.request.Request(front.address + path, body, headers), timeout=WAIT_S
        ) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny-pt", "/v1/completions", "/metrics", "/nothing"])
@pytest.mark.parametrize("key", [None, "", "first-key-of-the-test", "x" * 5000])
def test_without_a_key_nothing_but_health_and_the_page_is_told(
    locked_front_end: FrontEnd, path: str, key: str | None
) -> None:
    body = b'{"prompt": "a"}' if path == "/v1/completions" else None
    status, headers, text = ask(locked_front_end, path, key, body)
    error = json.loads(text)["error"]
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert not key or key not in text


def test_health_and_the_page_are_open_and_any_key_opens_the_rest(locked_front_end: FrontEnd) -> None:
    for path in ("/", "/health", "/health/live", "/health/ready"):
        assert ask(locked_front_end, path, None)[0] == 200
    for key in API_KEYS:
        assert ask(locked_front_end, "/metrics", key)[0] == 200
        with openai.OpenAI(base_url=f"{locked_front_end.address}/v1", api_key=key, max_retries=0) as api:
            assert [model.id for model in api.models.list()] == [MODEL]
            answer = api.completions.create(model=MODEL, prompt="It is", max_tokens=2)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 2
    wrong = openai.OpenAI(base_url=f"{locked_front_end.address}/v1", api_key="wrong", max_retries=0)
    with wrong as api, pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        api.models.list()
    assert not any(key in locked_front_end.log.read_text() for key in (*API_KEYS, "wrong"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of this machine's loopback, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
         "2", "-keyout", folder / "key.pem", "-out", folder / "cert.pem", *names],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_is_spoken_where_there_is_a_certificate(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(API_KEYS[0])
    keys.chmod(0o644)
    cert, key = certificate
    with front_end(*NOWHERE, "--tls-cert", cert, "--tls-key", key, "--api-key-file", keys) as front:
        assert front.address.startswith("https://127.0.0.1:")
        assert "other users can read the API keys" in front.log.read_text()
        trusting = ssl.create_default_context(cafile=str(cert))
        with urllib.request.urlopen(f"{front.address}/health/live", timeout=WAIT_S, context=trusting) as response:
            assert response.status == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{front.address}/health/live", timeout=WAIT_S)
        port = int(front.address.rpartition(":")[2])
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain).read()
    assert tls_context(cert, key).minimum_version == ssl.TLSVersion.TLSv1_2


def test_the_command_refuses_what_would_be_open_or_cannot_work(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    assert "there is no API key; give --api-key-file" in refusal("openai", *NOWHERE, "--host", "0.0.0.0")
    assert "TLS needs both" in refusal("openai", *NOWHERE, "--tls-cert", certificate[0])
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert "has no API key" in refusal("openai", *NOWHERE, "--api-key-file", empty)
    assert "no certificate with its key" in refusal("openai", *NOWHERE, "--tls-cert", empty, "--tls-key", empty)
    assert "an API key is empty" in refusal("openai", *NOWHERE, env={"PT_API_KEYS": "schlüssel"})
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", certificate[1], "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    both = ("--tls-cert", certificate[0], "--tls-key", locked)
    assert "is encrypted, expected a key without a password" in refusal("openai", *NOWHERE, *both)
