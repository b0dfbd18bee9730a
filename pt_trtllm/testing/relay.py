"""Virtual cables that delay: a process that passes Ethernet frames between TAP devices, each after a fixed time.

For kernels without netem. `python -m pt_trtllm.testing.relay FD...` is that process; lines on its stdin say the delay
in seconds (0 at first), it says READY once frames pass, and it ends with its stdin.
While a message is on its way the ranks wait for it, so that the relay's use of a core costs them little.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

from pt_trtllm.errors import CommunicationError

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
MAX_FRAME = 1 << 16
READY = "ready"
EXIT_S = 5.0
REAL_TIME_PRIORITY = 10


class Relay:
    """`devices` are the cables' ends, to be moved to where they are used; they vanish when the relay is closed."""

    def __init__(self, num_devices: int) -> None:
        self.devices = [f"pt{os.getpid() % 10**6}t{index}" for index in range(num_devices)]
        ends: list[int] = []
        try:
            for name in self.devices:
                ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
                fcntl.ioctl(ends[-1], TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
            command = [sys.executable, "-m", __name__, *map(str, ends)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=ends, start_new_session=True
            )
        finally:
            for end in ends:
                os.close(end)  # the process has its own
        try:
            self._wait_until_ready()  # a host whose first frames are lost gives its peer up after some seconds
        except BaseException:
            self.close()
            raise

    def set_delay(self, delay_s: float) -> None:
        """On top of what passing a frame takes by itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{delay_s}\n".encode())
        self._process.stdin.flush()

    def _wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().decode().strip() != READY:
            raise CommunicationError("the relay between emulated hosts ended before it passed a frame")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def pass_frames(ends: Sequence[int]) -> None:
    """Every frame that comes in at one end leaves at all others, in order, one delay after it came."""
    delay_s = 0.0
    with contextlib.suppress(PermissionError):  # it must not wait for a core behind the ranks
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REAL_TIME_PRIORITY))
    print(READY, flush=True)
    waiting: deque[tuple[float, int, bytes]] = deque()
    sources = [*ends, 0]
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = select.select(sources, (), (), pause)[0]
        if 0 in ready:
            lines = os.read(0, MAX_FRAME).split()
            if not lines:
                return
            delay_s = float(lines[-1])
        for end in (end for end in ready if end != 0):
            with contextlib.suppress(OSError):  # a device that is not up yet
                waiting.append((time.monotonic() + delay_s, end, os.read(end, MAX_FRAME)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, source, frame = waiting.popleft()
            for end in ends:
                if end != source:
                    with contextlib.suppress(OSError):  # its host is gone
                        os.write(end, frame)


if __name__ == "__main__":
    pass_frames([int(text) for text in sys.argv[1:]])
