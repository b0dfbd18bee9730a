"""Sending that never waits for the other side."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque


class Outbox:
    """What is to be sent over a socket, in order. Any thread may put something in.

    What the socket takes at once goes out in the caller's thread. Where the other side does not read, the rest is kept
    here, and a thread of its own sends it: a process that hangs must not hold up those who are about to end it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._kept: deque[memoryview] = deque()
        """The first of them is being sent."""
        self._news = threading.Condition()
        self._is_open = True
        threading.Thread(target=self._send_kept, name="pt-trtllm-outbox", daemon=True).start()

    def put(self, data: bytes) -> None:
        """Without effect when the other side has gone: the reader of the socket finds out."""
        with self._news:
            if not self._is_open:
                return
            rest = memoryview(data)
            if not self._kept:
                rest = rest[self._send_at_once(rest) :]
            if rest:
                self._kept.append(rest)
                self._news.notify()

    def close(self) -> None:
        """What is kept is not sent any more. Shut the socket down to end what is being sent."""
        with self._news:
            self._is_open = False
            self._kept.clear()
            self._news.notify()

    def _send_at_once(self, data: memoryview) -> int:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            self._is_open = False
            return len(data)

    def _send_kept(self) -> None:
        with contextlib.suppress(OSError):
            while (data := self._next()) is not None:
                self._socket.sendall(data)
                with self._news:
                    if self._kept:
                        self._kept.popleft()
        self.close()

    def _next(self) -> memoryview | None:
        with self._news:
            self._news.wait_for(lambda: self._kept or not self._is_open)
            return self._kept[0] if self._is_open else None
