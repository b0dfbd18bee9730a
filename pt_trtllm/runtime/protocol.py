"""Between a client process and rank 0: one JSON object per line over a local socket.

client to rank 0    {"type": "submit", "requests": [[id, request], ...]}   {"type": "cancel", "id"}
                    {"type": "stats"}   {"type": "shutdown"}
rank 0 to client    {"type": "ready"}   {"type": "stats", "stats"}   {"type": "refused", "id", "kind", "message"}
                    {"type": "tokens", "outputs": [[id, [token, ...], finish_reason or null, extras], ...]}
                    {"type": "progress"}
A request ends with "refused" when it cannot be served, or by itself cannot go on; the kinds are those of `errors.py`.
Tokens come once per step; steps that give none, as those of a long prompt, are told of as progress now and then.
`extras` has "stop_reason" where a stop token or string of the request ended the answer,
and what was asked for: {"logprobs": a row per token, "prompt_logprobs": with the first tokens, a row per token of the
prompt from the second on}; a row is [[token, log-probability, rank], ...].
Logits of prompts are large and go through files: a finished request that asked for them has
`logits-{id}.safetensors`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsReader, SafetensorsWriter
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams

Message = dict[str, Any]
PROGRESS_PERIOD_S = 0.5
"""Steps without tokens are told of after so long without a message."""
LOGITS = "logits"
"""Name of the tensor in a file of logits."""


GONE: Message = {"type": "shutdown"}
"""A client that vanishes is one that said shutdown."""


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Channel:
    """Messages over a connected socket. One thread may read while others write whole messages."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb")

    def send(self, message: Message) -> None:
        """Raises OSError when the other side is gone."""
        self._socket.sendall(encode(message))

    def __iter__(self) -> Iterator[Message]:
        """Messages until the other side closes."""
        for line in self._file:
            if not line.endswith(b"\n"):
                return  # cut off in the middle of a message: the other side died
            message: Message = json.loads(line)
            yield message

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()


class Inbox:
    """What a client has sent so far, read by a thread of its own."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._messages: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="pt-trtllm-inbox", daemon=True).start()

    def empty(self) -> bool:
        return self._messages.empty()

    def get(self) -> Message:
        """Waits for a message. Raises what kept the thread from reading on."""
        message = self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    def _listen(self) -> None:
        try:
            for message in self._channel:
                self._messages.put(message)
        except OSError:
            pass
        except Exception as error:
            self._messages.put(error)
        self._messages.put(GONE)


def request_to_json(request: Request) -> Message:
    """The prompt as it is: `asdict` would copy it number by number."""
    return {
        "prompt_ids": request.prompt_ids,
        "params": dataclasses.asdict(request.params),
        "context_logits": request.context_logits,
        "priority": request.priority,
    }


def request_from_json(data: Message) -> Request:
    return Request(
        prompt_ids=tuple(data["prompt_ids"]),
        params=SamplingParams(**data["params"]),
        context_logits=data["context_logits"],
        priority=data["priority"],
    )


def logits_file(folder: Path, request_id: int) -> Path:
    return folder / f"logits-{request_id}.safetensors"


def write_logits(path: Path, rows: Sequence[torch.Tensor]) -> None:
    """float32 [prompt tokens, vocabulary], row by row."""
    width = len(rows[0])
    with SafetensorsWriter(path, [DeclaredTensor(LOGITS, torch.float32, (len(rows), width))]) as writer:
        for index, row in enumerate(rows):
            writer.write(LOGITS, row, index * width)


def read_logits(path: Path) -> torch.Tensor:
    reader = SafetensorsReader(path)
    try:
        return reader.read(LOGITS)
    finally:
        reader.close()
