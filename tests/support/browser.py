"""A headless Chromium, driven over its own debugging pipe (DevTools protocol, file descriptors 3 and 4): no library, no port.

For tests that look at a page as a reader does. `find` says where a Chromium is, or None.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-extensions", "--mute-audio", "--remote-debugging-pipe",
)  # fmt: skip


def find() -> str | None:
    """$CHROMIUM, or a Chromium on the PATH, or one of Playwright's."""
    named = os.environ.get("CHROMIUM")
    cached = sorted(Path.home().glob(".cache/ms-playwright/chromium*/chrome-*/*"))
    return named or next(filter(None, map(shutil.which, NAMES)), None) or next((str(p) for p in cached if p.name in NAMES), None)


class Browser:
    """One page in a Chromium. `events`: all it told, [{"method", "params"}]. A context manager."""

    def __init__(self, program: str, patience_s: float = 120):
        self.patience_s, self.events, self._count, self._rest = patience_s, [], 0, b""
        self._profile = tempfile.TemporaryDirectory(prefix="avsi-browser-", ignore_cleanup_errors=True)
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        ends = self._above_4(theirs_in), self._above_4(theirs_out)
        command = [program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        quoted = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'  # a shell sets the two numbers that Chromium looks for
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", quoted, "chromium", *command], pass_fds=ends, **quiet)
        for end in ends:
            os.close(end)
        os.set_blocking(self._from, False)
        self._session = None
        (page,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    @staticmethod
    def _above_4(end: int) -> int:
        """The same pipe under a number that 3 and 4 can't collide with."""
        import fcntl

        copied = fcntl.fcntl(end, fcntl.F_DUPFD, 10)
        os.close(end)
        return copied

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def __call__(self, method: str, **params) -> dict:
        """The result of a DevTools command; RuntimeError with what Chromium says where it fails, TimeoutError."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self.patience_s
        while time.monotonic() < until:
            answer = self._next()
            if answer is None:
                if self._process.poll() is not None:
                    raise RuntimeError(f"Chromium ended with {self._process.returncode}")
                time.sleep(0.01)
            elif answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            elif "method" in answer:
                self.events.append(answer)
        raise TimeoutError(f"{method}: no answer in {self.patience_s} s")

    def _next(self) -> dict | None:
        while b"\0" not in self._rest:
            try:
                data = os.read(self._from, 1 << 20)
            except BlockingIOError:
                return None
            if not data:
                return None
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, address: str, width: int, height: int = 900) -> None:
        """Loads a page in a window of that width and waits until all of it is there."""
        phone = {"mobile": width < 600, "deviceScaleFactor": 1}
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, **phone)
        self("Page.navigate", url=address)
        until = time.monotonic() + self.patience_s
        while self.ask("document.readyState") != "complete" or self.ask("location.href") != address:
            if time.monotonic() > until:
                raise TimeoutError(f"{address}: not there in {self.patience_s} s")
            time.sleep(0.05)

    def ask(self, expression: str):
        """What JavaScript says, promises waited for; the page's own policy doesn't hold for it."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", "it raised"))
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions, so far."""
        said = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                said.append(params["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                said.append(str(params["args"]))
            if event["method"] == "Runtime.exceptionThrown":
                said.append(str(params["exceptionDetails"]))
        return said

    def requested(self) -> set[str]:
        """Addresses asked for, those of data: left out."""
        asked = {e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"}
        return {address for address in asked if not address.startswith("data:")}

    def image(self, path: Path, y: int = 0, height: int = 0) -> None:
        """A PNG of the page, from y on, to its end unless `height` is given."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": y, "width": size["width"], "height": height or size["height"] - y, "scale": 1}
        drawn = self("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(drawn["data"]))

    def wait_for(self, expression: str, what: str = ""):
        """What JavaScript says as soon as it is true of it; TimeoutError."""
        until = time.monotonic() + self.patience_s
        while not (found := self.ask(expression)):
            if time.monotonic() > until:
                raise TimeoutError(f"{what or expression}: not so in {self.patience_s} s")
            time.sleep(0.05)
        return found

    def put_in(self, selector: str, *files: Path) -> None:
        """Files into an <input type=file>, as if chosen by hand."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        field = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", files=[str(f) for f in files], nodeId=field)
