"""Who may ask: API keys, and where the front end listens without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pt_trtllm.errors import ConfigError
from pt_trtllm.openai.keys import Keys, is_private, read_key_file
from pt_trtllm.openai.options import FrontEndOptions, is_loopback

pytestmark = pytest.mark.unit


def options(**changes: Any) -> FrontEndOptions:
    return FrontEndOptions(url="127.0.0.1:8001", tokenizer_dir=Path(), **changes)


def test_only_a_known_key_of_the_right_scheme_is_accepted() -> None:
    keys = Keys(["first-key", "second-key"])
    assert keys.accept("Bearer first-key")
    assert keys.accept("bearer  second-key ")
    refused = ("", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-ke", "Bearer first-keys",
               "Bearer first-key second-key", "Bearer f\udcffirst-key")  # fmt: skip
    for header in refused:
        assert not keys.accept(header), header
    assert not Keys([]).accept("Bearer ")
    assert not Keys([])


def test_a_file_has_one_key_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n one \ntwo\n")
    assert read_key_file(file) == ("one", "two")
    file.chmod(0o640)
    assert not is_private(file)
    file.chmod(0o600)
    assert is_private(file)
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no API key, expected one a line"):
        read_key_file(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        read_key_file(file)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\nbreak"])
def test_a_key_must_fit_into_a_header(key: str) -> None:
    with pytest.raises(ConfigError, match="an API key is empty or has characters"):
        options(api_keys=(key,))


def test_keys_are_not_shown() -> None:
    assert "sesame" not in repr(options(api_keys=("sesame",)))


@pytest.mark.parametrize(("host", "expected"), [
    ("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("::1", True),
    ("0.0.0.0", False), ("::", False), ("", False), ("192.0.2.1", False), ("no-such-host.invalid", False),
])  # fmt: skip
def test_without_a_key_only_this_machine_may_ask(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    if expected:
        options(host=host)
        return
    with pytest.raises(ConfigError, match="where others can reach it, and there is no API key"):
        options(host=host)
    options(host=host, allow_no_key=True)
    options(host=host, api_keys=("key",))


def test_tls_needs_a_certificate_and_its_key() -> None:
    with pytest.raises(ConfigError, match="TLS needs both"):
        options(tls_cert=Path("cert.pem"))
