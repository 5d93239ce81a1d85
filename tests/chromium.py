"""A headless Chromium, driven through its debugging pipe: what a reader sees, presses and is told.

Source: the Chrome DevTools Protocol; with ``--remote-debugging-pipe`` its messages go over file descriptors 3 and
4, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions "
    "--disable-background-networking --remote-debugging-pipe"
)


class Refused(AssertionError):
    """The browser answers a command with an error, as where the page is left before the command ends."""


class Chromium:
    """A browser with one page. Everything that goes wrong in the page is kept in ``errors``.

    Attributes:
        errors: Console errors and warnings, exceptions, failed requests.
        requests: Every URL that was asked for.
    """

    def __init__(self) -> None:
        assert BROWSER is not None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._buffer = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        command_read, self._write = os.pipe()
        self._read, answer_write = os.pipe()

        plugged = f'exec 3<&{command_read} 4>&{answer_write}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", plugged, "-", BROWSER, *_FLAGS.split(), f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.page(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, session: str | None = None, timeout_s: float = 60, **params: Any) -> dict[str, Any]:
        """Send a command and give its result."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        self._wait(lambda: number in self._answers, timeout_s, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise Refused(str(answer))
        result: dict[str, Any] = answer["result"]
        return result

    def page(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to the page."""
        return self.send(method, self._session, **params)

    def _wait(self, done: Any, timeout_s: float, what: str) -> None:
        end = time.monotonic() + timeout_s
        while not done():
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, f"no answer to {what} in {timeout_s} s"
            self._buffer += os.read(self._read, 1 << 20)
            *whole, self._buffer = self._buffer.split(b"\0")
            for text in whole:
                self._take(json.loads(text))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        name, params = message["method"], message.get("params", {})
        self._events.append(name)
        if name == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(params["entry"]["text"]))
        elif name == "Network.loadingFailed" and not params.get("canceled"):
            self.errors.append(str(params["errorText"]))
        elif name == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, url: str, width: int = 1200, height: int = 900, *, dark: bool = False) -> None:
        """Open a page and wait until it is loaded."""
        self.resize(width, height, dark=dark)
        self._events.clear()
        self.page("Page.navigate", url=url)
        self._wait(lambda: "Page.loadEventFired" in self._events, 60, url)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the window's size, and light or dark."""
        self.page("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.page("Emulation.setEmulatedMedia", features=scheme)

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page; a promise is waited for."""
        answer = self.page("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 15) -> None:
        """Wait until JavaScript says so; a page that is left while it is asked says no."""
        end = time.monotonic() + timeout_s
        while True:
            with suppress(Refused):
                if self.run(f"Boolean({expression})"):
                    return
            assert time.monotonic() < end, f"never became true: {expression}"
            time.sleep(0.05)

    def press(self, key: str, text: str = "") -> None:
        """Press a key, as ``Tab``, ``Enter``, ``ArrowRight``, ``Escape``."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        text = text or ("\r" if key == "Enter" else "")
        self.page("Input.dispatchKeyEvent", type="keyDown", **shared, **({"text": text} if text else {}))
        with suppress(Refused):  # the key may have left the page
            self.page("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self.page("Input.insertText", text=text)

    def scrolls_sideways(self) -> bool:
        """Whether the page is wider than the window."""
        return bool(self.run("document.documentElement.scrollWidth > document.documentElement.clientWidth"))

    def broken_images(self) -> list[str]:
        """Images that did not load."""
        script = (
            "Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().then(() => null, () => "
            "(i.alt || i.src).slice(0, 80)); })).then(all => all.filter(Boolean))"
        )
        found: list[str] = self.run(script)
        return found

    def violations(self) -> list[str]:
        """What axe-core finds wrong for those who cannot see, tell colours or use a mouse."""
        self.run((resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
        words = "v => `${v.id}: ${v.nodes.map(n => n.html).join(' ').slice(0, 300)}`"
        found: list[str] = self.run(f"axe.run().then(all => all.violations.map({words}))")
        return found

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save a picture of the window, or of the whole page."""
        shot = self.page("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
