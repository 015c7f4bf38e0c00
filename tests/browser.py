"""Chromium without a window, driven through its debugging pipe."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

import pytest


class Browser:
    """One page of a browser that reaches this machine only. Notes what its console and its network say."""

    def __init__(self, profile):
        program = shutil.which("chromium")
        if program is None:
            pytest.fail("chromium is missing: `tools/setup.sh browser` installs it")
        commands, self._to = os.pipe()
        self._from, events = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
        ]
        # The browser reads file 3 and writes file 4.
        line = f'exec "$0" "$@" 3<&{commands} 4>&{events} {commands}<&- {events}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, *flags, "about:blank"],
            pass_fds=(commands, events),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(events)
        self._buffer, self._number, self._session = b"", 0, None
        self.problems, self.requests = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")
        size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def close(self):
        self._session = None
        self.call("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)

    def _receive(self, timeout):
        end = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
            if not ready:
                pytest.fail("the browser does not answer")
            part = os.read(self._from, 1 << 20)
            if not part:
                pytest.fail("the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        """Call a method of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(timeout=120)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event):
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script):
        """Return the value of an expression in the page; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                pytest.fail(
                    f"{condition} does not come true; {self.run('document.body.innerText')}"
                )
            time.sleep(0.05)

    def press(self, key, modifiers=0):
        """Press a key by its name; modifiers: 2 is Ctrl, 8 is Shift."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        event = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        if key != "Tab":
            event["text"] = "\r" if key == "Enter" else key
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def emulate(self, color_scheme):
        feature = {"name": "prefers-color-scheme", "value": color_scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def accessible(self):
        """Return [(role, name)] of the page as a screen reader gets it."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def picture(self):
        """Return a PNG of what the window shows."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
