"""A real browser without a network, steered through its debugging pipe: what it shows is waited for, not timed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")


class Browser:
    """One tab.

    Attributes:
        errors: exceptions that the page's scripts threw.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self._session = ""
        self._number, self._rest = 0, b""
        self.errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page.enable", "Runtime.enable"):
            self._call(name)

    def open(self, page: Path | str, width: int = 1100, height: int = 1300) -> None:
        """Load a file, or an address on this machine, in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self.run(
            "await new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )

    def run(self, script: str) -> Any:
        """Run a script, which may wait and return something."""
        expression = f"(async () => {{ {script} }})()"
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._answers.fileno(), 1 << 20)
                assert read, "the browser ended"
                self._rest += read
            one, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(one)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]))
            if answer.get("id") == self._number:
                assert "result" in answer, answer
                result: dict[str, Any] = answer["result"]
                return result


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium was found: install it (Debian: apt-get install chromium)")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    def wire() -> None:
        # Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
        inner = os.dup(theirs_out)
        os.dup2(theirs_in, 3)
        os.dup2(inner, 4)

    line = [program, *_FLAGS, f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with subprocess.Popen(
        line, preexec_fn=wire, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            process.kill()
