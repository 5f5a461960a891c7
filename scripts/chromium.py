"""Drive headless Chromium over its DevTools pipe: no driver, no socket, no package beyond Python's own.

    with Chromium() as browser:
        page = browser.open(Path("report.html"))
        page.evaluate("document.title")
        page.screenshot(Path("report.png"))

Everything the page logs, throws or requests is kept in `page.events`, so that a test can say there was nothing.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--no-default-browser-check",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes answers to 4.
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")


def find() -> str | None:
    """Return the path of Chromium (`$CHROMIUM`, or the first of its usual names), or None."""
    return next(
        (path for name in (os.environ.get("CHROMIUM", ""), *_NAMES) if name and (path := shutil.which(name))), None
    )


class Chromium:
    """A browser with a fresh profile; leaving the `with` block ends it and removes the profile."""

    def __init__(self, binary: str | None = None, timeout: float = 60.0) -> None:
        binary = binary or find()
        if binary is None:
            raise FileNotFoundError("no Chromium: install it (Debian: apt-get install chromium) or set $CHROMIUM")
        self.timeout = timeout
        self._profile = tempfile.mkdtemp(prefix="assay-chromium-")
        its_in, self._out = os.pipe()
        self._in, its_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (its_in, its_out)]  # clear of 3 and 4, which they become

        profile = f"--user-data-dir={self._profile}"
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _LAUNCH, *map(str, high), binary, *FLAGS, profile, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=high,
            start_new_session=True,
        )
        for fd in (its_in, its_out, *high):
            os.close(fd)
        self._buffer = b""
        self._next = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for fd in (self._in, self._out):
            os.close(fd)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result.

        Raises:
            RuntimeError: The browser answered with an error.
            TimeoutError: It did not answer.
        """
        self._next += 1
        number = self._next
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self.wait(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait(self, done: Any, what: str) -> None:
        """Read messages until `done()` is true."""
        end = time.monotonic() + self.timeout
        while not done():
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"Chromium did not answer {what} within {self.timeout} s")
            if select.select([self._in], [], [], min(left, 0.5))[0]:
                self._read()
            elif self._process.poll() is not None:
                raise RuntimeError(f"Chromium ended with status {self._process.returncode} during {what}")

    def _read(self) -> None:
        chunk = os.read(self._in, 1 << 20)
        if not chunk:
            raise RuntimeError("Chromium closed its end of the pipe")
        *messages, self._buffer = (self._buffer + chunk).split(b"\0")
        for raw in messages:
            message = json.loads(raw)
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1) -> Page:
        """Open a file in a new tab and wait until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height, scale)
        page.prefer(dark=dark)
        page.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(lambda: any(e["method"] == "Page.loadEventFired" for e in page.events), "loading")
        page.settle()
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser = browser
        self.session = session

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every DevTools event of this tab so far."""
        return [event for event in self.browser.events if event.get("sessionId") == self.session]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this tab."""
        return self.browser.call(method, self.session, **params)

    def settle(self) -> None:
        """Wait until what has been asked for is painted."""
        painted = "requestAnimationFrame(() => requestAnimationFrame(done))"
        self.evaluate(f"new Promise(done => {{ {painted}; setTimeout(done, 1000); }}).then(() => 1)")

    def front(self) -> None:
        """Make this the tab in front; one behind is not painted."""
        self.call("Page.bringToFront")

    def close(self) -> None:
        """Close this tab."""
        self.call("Page.close")

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Set the viewport, in CSS pixels, and the device pixels in each."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def prefer(self, *, dark: bool = False, still: bool = True) -> None:
        """Set what the system prefers: a dark or light theme, reduced motion or not."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression!r}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def hover(self, x: float, y: float) -> None:
        """Move the pointer to a place in the viewport."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key, by its DOM name."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38}
        code = (codes | {"ArrowRight": 39, "ArrowDown": 40}).get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=8 * shift
            )
        self.settle()

    def screenshot(self, path: Path, *, clip: dict[str, float] | None = None) -> None:
        """Write a PNG of the viewport, or of a part of the page."""
        params: dict[str, Any] = {"format": "png"}
        if clip is not None:
            params |= {"clip": {"scale": 1, **clip}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **params)["data"]))
