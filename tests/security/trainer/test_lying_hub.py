"""A hub that lies about what it sends."""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.trainer.runs import SOURCES

RANGE_PROGRAM = """
import re
from pathlib import Path
from lora_trainer.hub import read_range
peak = lambda: int(re.search("VmHWM: *(.*) kB", Path("/proc/self/status").read_text())[1])
before = peak()
piece = read_range("team/tiny", "main", "model.safetensors", 4, 12)
print(piece.decode(), (peak() - before) // 1024)
"""


class Endless(BaseHTTPRequestHandler):
    """Answers each request with far more than was asked for, with or without a word of ranges."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        with suppress(ConnectionError):
            while True:
                self.wfile.write(b"0123456789abcdef" * 65536)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize(("status", "piece"), [(200, "456789ab"), (206, "01234567")])
def test_a_hub_that_sends_more_than_it_was_asked_for(status: int, piece: str) -> None:
    """Attack: a hub, or who answers in its name, sends a terabyte where some bytes of a header were asked for."""
    handler = type("Handler", (Endless,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": os.pathsep.join(map(str, SOURCES)), "LORA_STORE_RETRY_SECONDS": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",  # as in the image: the library asks the hub about itself otherwise
        }  # fmt: skip
        command = ["bash", "-c", 'ulimit -v 8388608; exec "$@"', "-", sys.executable, "-c", RANGE_PROGRAM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    got, grown = done.stdout.split()
    assert got == piece
    assert int(grown) < 64, "MiB"
