"""A headless Chromium, told what to do over a pipe (its DevTools protocol): no driver, no library, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page at a time, what it said, and what it asked for."""

    def __init__(self, folder: Path) -> None:
        read_here, self._written = os.pipe()
        self._read, write_here = os.pipe()
        # Beyond 3 and 4, which the browser takes, so that neither is in the way of the other.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in (read_here, write_here)]
        os.close(read_here)
        os.close(write_here)
        self._program = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{high[0]} 4>&{high[1]}',
                "bash",
                str(chromium()),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-dev-shm-usage",
                "--remote-debugging-pipe",
                f"--user-data-dir={folder}",
            ],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for one in high:
            os.close(one)
        self._rest = b""
        self._calls = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._written)
        self._program.terminate()
        self._program.wait(30)
        os.close(self._read)

    def call(self, method: str, **params: Any) -> Any:
        self._calls += 1
        request = {"id": self._calls, "method": method, "params": params}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._written, json.dumps(request).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._calls:
                assert "error" not in found, found["error"]
                return found["result"]

    def open(self, page: Path, *, width: int, scripts: bool = True, dark: bool = False) -> None:
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def said(self) -> list[dict[str, Any]]:
        """What came to the console, errors and refused content among it."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def asked_for(self) -> list[str]:
        """Every address that was requested."""
        sent = (event["params"]["request"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [request["url"] for request in sent]

    def picture(self, path: Path, selector: str = "body") -> None:
        """A screenshot of an element, for people."""
        place = self.evaluate(
            f"(r => ({{x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}}))"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        found = self.call("Page.captureScreenshot", clip={**place, "scale": 1}, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 16)
            assert piece, "Chromium has ended"
            self._rest += piece
        whole, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(whole)
        if "method" in found:
            self.events.append(found)
        return found
