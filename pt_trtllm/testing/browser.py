"""A real headless browser for tests: Chromium, driven through its DevTools protocol over a WebSocket."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip
START_S, ANSWER_S = 240.0, 240.0


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. Whatever it complains about is in `problems`: errors, and what its policy refused."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self.requested: list[str] = []
        """Addresses that the page asked for."""
        self._socket, self._ids = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await asyncio.wait_for(self._answers[number], ANSWER_S)

    async def open(self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.command(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[scheme])
        await self.resize(width, height)
        await self.command("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def resize(self, width: int, height: int) -> None:
        mobile = width < 600
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited; raises what it throws."""
        answer = await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, expression: str, timeout_s: float = ANSWER_S) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not await self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never became true: {expression}; problems: {self.problems}"
            await asyncio.sleep(0.05)

    async def press(self, key: str, modifiers: int = 0) -> None:
        text = {"Enter": "\r"}.get(key)
        event = {"key": key, "code": key, "windowsVirtualKeyCode": {"Enter": 13, "Escape": 27, "Tab": 9}[key]}
        await self.command(
            "Input.dispatchKeyEvent", type="keyDown", modifiers=modifiers, **event, **({"text": text} if text else {})
        )
        await self.command("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **event)

    async def type(self, text: str) -> None:
        await self.command("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle: fails where something else lies on top."""
        box = await self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect(); "
            "const x = b.x + b.width / 2, y = b.y + b.height / 2; "
            "const hit = document.elementFromPoint(x, y); return [x, y, e.contains(hit) || hit?.contains(e)]; })()"
        )
        assert box[2], f"{selector} is covered"
        for kind in ("mousePressed", "mouseReleased"):
            await self.command("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    async def listen(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                future = self._answers.pop(data["id"])
                if not future.done():
                    future.set_result(data.get("result", {"error": data.get("error")}))
            else:
                self._note(data["method"], data["params"])

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])


@asynccontextmanager
async def browser_page() -> AsyncIterator[Page]:
    """A fresh browser with an empty profile, ended on leaving."""
    program = find_browser()
    assert program is not None, "no browser"
    with tempfile.TemporaryDirectory(prefix="pt-browser-", ignore_cleanup_errors=True) as folder:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        process = subprocess.Popen(
            [program, *FLAGS, *root, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port = await _debugging_port(Path(folder), process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as response:
                    tabs = await response.json()
                url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    page = Page(socket)
                    listener = asyncio.create_task(page.listen())
                    yield page
                    listener.cancel()
                    with suppress(asyncio.CancelledError):
                        await listener
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _debugging_port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    """Chromium takes a free port and writes it down."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        with suppress(OSError, ValueError, IndexError):
            return int((profile / "DevToolsActivePort").read_text().splitlines()[0])
        await asyncio.sleep(0.05)
    raise AssertionError(f"the browser did not open its debugging port within {START_S:.0f} s")
