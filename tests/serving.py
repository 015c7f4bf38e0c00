"""A running `moba serve` and its clients."""

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest
from builds import SMOLLM2, existing


class Server:
    """A running `moba serve` and its clients."""

    def __init__(self, build_folder, *flags, model=SMOLLM2, preexec=None):
        program = existing(build_folder / "moba", "`make build` makes it")
        defaults = {"-m": model, "-t": 2, "--dtype": "f32", "--port": 0, "--cache-size": "600m"}
        arguments = [*flags]
        for flag, value in defaults.items():
            if flag not in flags:
                arguments += [flag, value]
        self.process = subprocess.Popen(
            [program, "serve", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=preexec,
            restore_signals=preexec is None,
        )
        self.line = self.process.stdout.readline().decode()
        assert self.line, self.process.stderr.read().decode()
        self.url = re.search(r"http://\S+(?=/v1)", self.line)[0]
        self.port = int(self.url.rpartition(":")[2])

    def client(self, **settings):
        settings = {"api_key": "none", "max_retries": 0, "timeout": 120, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def send(self, path, body=None, **fields):
        """Return status, fields and text of a response."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, fields)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def raw(self, data, timeout=20):
        """Send bytes as they are; return what comes until the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            answer = b""
            try:
                while part := connection.recv(1 << 16):
                    answer += part
            except ConnectionResetError:
                pass
            return answer

    def metric(self, name):
        return int(re.search(rf"^moba_{name} (\d+)$", self.send("/metrics")[2], re.MULTILINE)[1])

    def wait_until_idle(self):
        """Wait until no request is left and every used page is a cached prefix."""
        for _ in range(200):
            text = self.send("/metrics")[2]
            found = dict(re.findall(r"^moba_(\w+) (\d+)$", text, re.MULTILINE))
            busy = int(found["num_requests_running"]) + int(found["num_requests_waiting"])
            if busy == 0 and found["kv_cache_pages_used"] == found["kv_cache_pages_cached"]:
                return
            time.sleep(0.05)
        pytest.fail(text)

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=30)
        return code, self.process.stderr.read().decode()
