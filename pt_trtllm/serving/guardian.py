"""A process that outlives the launcher by a moment: when that ends, however it ends, nothing of the server stays.

`python -m pt_trtllm.serving.guardian FOLDER`, with a pipe as its input that only the launcher can write to. It never
does: the pipe ends with the launcher.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from pt_trtllm.serving.belongings import Belongings

WAIT_S = 90.0


class Guardian:
    """The launcher's side. Both hold the lock: neither's death gives what the other still uses to the next server."""

    def __init__(self, belongings: Belongings) -> None:
        self._belongings = belongings
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pt_trtllm.serving.guardian", str(belongings.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, pass_fds=[belongings.lock], preexec_fn=_ignore_signals,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def dismiss(self) -> None:
        """Returns when it has swept what was still there, or cannot."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:  # a signal has stopped it
            self._process.kill()
            self._process.wait()
        self._belongings.release()


def _ignore_signals() -> None:
    """From the first moment on: what is ignored stays so in the program that is started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    Belongings(Path(sys.argv[1])).sweep()
