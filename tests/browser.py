"""A Chromium without a window, driven over a pipe by its DevTools protocol, for tests of pages."""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

#: Where a browser may be; None where there is none.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: Seconds that end a wait; reaching it means that the browser hangs.
LONG = 60

#: No sandbox, because tests run as root in containers, whose /dev/shm is small; nothing but our own pages is opened.
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-breakpad"),
    "--remote-debugging-pipe",
)


class Browser:
    """A running browser; close it, or it stays."""

    def __init__(self):
        self._folder = tempfile.mkdtemp(prefix="page-browser-")
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        # The browser reads descriptor 3 and writes 4, whatever their numbers are here.
        shell = f'exec "$0" "$@" 3<&{commands_in} 4>&{answers_out}'
        options = (*OPTIONS, f"--user-data-dir={self._folder}", "about:blank")
        self._process = subprocess.Popen(
            ["bash", "-c", shell, CHROMIUM, *options],
            pass_fds=(commands_in, answers_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands_in)
        os.close(answers_out)
        self._received = b""
        self._n_sent = 0
        self.events = []

    @property
    def group(self):
        """The process group of the browser and all its helpers."""
        return self._process.pid

    def close(self):
        """Kill the browser and its helpers, and remove its folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(LONG)
        os.close(self._commands)
        os.close(self._answers)
        # A helper may write while it dies.
        end = time.monotonic() + LONG
        while os.path.exists(self._folder) and time.monotonic() < end:
            shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, method, session=None, **parameters):
        """Return what the browser answers to a command; events that come meanwhile are kept."""
        self._n_sent += 1
        message = {"id": self._n_sent, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        number = self._n_sent
        while (answer := self._receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self):
        while b"\0" not in self._received:
            assert select.select([self._answers], [], [], LONG)[0], f"no answer of the browser for {LONG} s"
            data = os.read(self._answers, 1 << 16)
            assert data, "the browser has ended"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)


class Tab:
    """A page in a browser, in a window of its own size."""

    def __init__(self, browser, path, *, width=1200, height=900, dark=False, fragment="", ratio=1, still=True):
        self._browser = browser
        self._target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=False
        )
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        self.emulate(**features)
        self.send("Page.navigate", url=path.as_uri() + fragment)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._browser.send("Target.closeTarget", targetId=self._target)

    def send(self, method, **parameters):
        """Send a command to this page."""
        return self._browser.send(method, session=self._session, **parameters)

    def emulate(self, **features):
        """Have the media features, such as ``prefers-color-scheme``, that are given."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])

    def evaluate(self, expression):
        """Return the value of an expression, or of what it promises."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + LONG
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}; complaints: {self.complaints}"
            time.sleep(0.01)
        return value

    def frame(self):
        """Wait until what was asked for is drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def mouse(self, kind, x, y, **more):
        """Move, press, release or turn the wheel of the mouse."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        """Press and release the left button."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def key(self, key, **more):
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    def screenshot(self, path):
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    @property
    def complaints(self):
        """What the page wrote to the console, threw, or was refused."""
        self.evaluate("0")
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(event["params"])
        return found

    @property
    def requests(self):
        """The addresses that the page asked for."""
        events = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
