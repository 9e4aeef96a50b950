"""A headless Chromium, controlled over its own debugging pipe (DevTools protocol, file descriptors 3 and 4): no library, no port.

For tests of HTML pages. `find` returns the path of a Chromium, or None. The constants are JavaScript expressions that check a page.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PLAYERS = """Promise.all([...document.querySelectorAll('audio')].map(a => new Promise(done => {
    const report = () => done({error: a.error && a.error.message, seconds: a.duration, state: a.readyState});
    a.onloadeddata = report; a.onerror = report; a.preload = 'auto'; a.load();
})))"""  # [{error, seconds, state}] of all <audio> elements, loaded
OUTSIDE_WINDOW = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('svg') &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ': ' + e.textContent.slice(0, 40))"""
CLIPPED = """[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1 &&
    getComputedStyle(e).overflowX != 'auto').length"""  # elements that are wider than their box and do not scroll
LOW_CONTRAST = """(() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 :
        ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
    const written = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    return [...document.querySelectorAll('body *')].filter(written).filter(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05) < 4.5; }).map(e => e.textContent.slice(0, 40));
})()"""  # texts with a contrast below 4.5 to 1 (WCAG 2.2, AA)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-extensions", "--mute-audio", "--remote-debugging-pipe",
)  # fmt: skip


def find() -> str | None:
    """$CHROMIUM, a Chromium on the PATH, or one installed by Playwright; None if there is none."""
    named = os.environ.get("CHROMIUM")
    cached = sorted(Path.home().glob(".cache/ms-playwright/chromium*/chrome-*/*"))
    return named or next(filter(None, map(shutil.which, NAMES)), None) or next((str(p) for p in cached if p.name in NAMES), None)


class Browser:
    """One page in a Chromium. `events`: all DevTools events so far, [{"method", "params"}]. A context manager."""

    def __init__(self, program: str, timeout_s: float = 120):
        self.timeout_s, self.events, self._count, self._rest = timeout_s, [], 0, b""
        self._profile = tempfile.TemporaryDirectory(prefix="avsi-browser-", ignore_cleanup_errors=True)
        child_in, self._to = os.pipe()
        self._from, child_out = os.pipe()
        ends = self._above_4(child_in), self._above_4(child_out)
        command = [program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        quoted = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'  # a shell sets the two descriptors that Chromium expects
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
        """The same pipe under another descriptor, so that it does not collide with 3 and 4."""
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
        """The result of a DevTools command. Raises RuntimeError with Chromium's message if it fails, and TimeoutError."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self.timeout_s
        while time.monotonic() < until:
            reply = self._next()
            if reply is None:
                if self._process.poll() is not None:
                    raise RuntimeError(f"Chromium ended with {self._process.returncode}")
                time.sleep(0.01)
            elif reply.get("id") == self._count:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]
            elif "method" in reply:
                self.events.append(reply)
        raise TimeoutError(f"{method}: no reply after {self.timeout_s} s")

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
        """Loads a page in a window of that width and waits until it is complete."""
        options = {"mobile": width < 600, "deviceScaleFactor": 1}
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, **options)
        self("Page.navigate", url=address)
        until = time.monotonic() + self.timeout_s
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") != address:
            if time.monotonic() > until:
                raise TimeoutError(f"{address}: not loaded after {self.timeout_s} s")
            time.sleep(0.05)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, after promises are resolved. The page's own policy does not apply to it."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "it raised"))
        return result["result"].get("value")

    def console_errors(self) -> list[str]:
        """Errors and warnings on the console, and exceptions, so far."""
        messages = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                messages.append(params["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                messages.append(str(params["args"]))
            if event["method"] == "Runtime.exceptionThrown":
                messages.append(str(params["exceptionDetails"]))
        return messages

    def requested(self) -> set[str]:
        """The addresses requested so far, without data: addresses."""
        addresses = {e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"}
        return {address for address in addresses if not address.startswith("data:")}

    def screenshot(self, path: Path, y: int = 0, height: int = 0) -> None:
        """Writes a PNG of the page from y on, to its end unless `height` is given."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": y, "width": size["width"], "height": height or size["height"] - y, "scale": 1}
        captured = self("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(captured["data"]))

    def wait_for(self, expression: str, what: str = ""):
        """The value of a JavaScript expression as soon as it is true. Raises TimeoutError."""
        until = time.monotonic() + self.timeout_s
        while not (value := self.evaluate(expression)):
            if time.monotonic() > until:
                raise TimeoutError(f"{what or expression}: not so after {self.timeout_s} s")
            time.sleep(0.05)
        return value

    def choose_files(self, selector: str, *files: Path) -> None:
        """Chooses files in an <input type=file>."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        field = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", files=[str(f) for f in files], nodeId=field)
