"""A gRPC call made by hand: headers that no client library would send."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, DATA, SETTINGS, GOAWAY = 1, 0, 4, 7
END_STREAM, END_HEADERS = 1, 4
TIMEOUT_S = 60.0


def raw_call(url: str, method: str, headers: dict[str, str]) -> bytes:
    """What the server sends back for an empty request, up to the stream's end."""
    host, _, port = url.rpartition(":")
    fields = {
        ":method": "POST", ":scheme": "http", ":path": f"/inference.GRPCInferenceService/{method}",
        ":authority": "test", "content-type": "application/grpc", "te": "trailers", **headers,
    }  # fmt: skip
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        connection.sendall(PREFACE + _frame(SETTINGS, 0, 0, b"") + _frame(HEADERS, END_HEADERS, 1, block))
        connection.sendall(_frame(DATA, END_STREAM, 1, b"\0" * 5))
        received, has_ended = b"", False
        stream = connection.makefile("rb")
        while not has_ended and len(head := stream.read(9)) == 9:
            kind, flags = head[3], head[4]
            received += stream.read(int.from_bytes(head[:3], "big"))
            has_ended = kind == GOAWAY or (kind in (HEADERS, DATA) and bool(flags & END_STREAM))
        return received


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _text(text: str) -> bytes:
    """As HPACK writes a short string without compression."""
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()
