"""The playground: one page without anything from elsewhere, put together from the files beside this one."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

SCRIPTS = ("markup.js", "key.js", "metrics.js", "charts.js", "chat.js")


def load_page() -> tuple[str, dict[str, str]]:
    """The page, and headers that forbid it everything but its own code and this server."""
    folder = resources.files(__package__)
    style = folder.joinpath("style.css").read_text(encoding="utf-8")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script), headers


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
