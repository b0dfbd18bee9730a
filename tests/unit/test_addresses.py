"""Which addresses are this machine's own, and so never reached through a proxy."""

from __future__ import annotations

import pytest

from pt_trtllm.serving.addresses import channel_options, is_loopback

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "::1", "[::1]", "0.0.0.0", "[::]"]
)
def test_loopback_takes_no_proxy(host: str) -> None:
    assert is_loopback(host)
    assert channel_options(f"{host if ':' not in host or '[' in host else f'[{host}]'}:8001")


@pytest.mark.parametrize("host", ["10.0.0.1", "example.org", "localhost.example.org", "[2001:db8::1]", "127.0.0.1.org"])
def test_others_keep_the_users_proxy(host: str) -> None:
    assert not is_loopback(host)
    assert channel_options(f"{host}:8001") == ()
