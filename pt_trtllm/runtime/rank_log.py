"""What a rank writes to its log besides what libraries do."""

from __future__ import annotations

import contextlib
import os
import traceback


def log_traceback(error: BaseException) -> None:
    """Never raises: the disk of the log may be full."""
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
