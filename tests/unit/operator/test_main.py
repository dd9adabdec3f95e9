"""The process: how it ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scale.proxy import write_kubeconfig


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_operator_that_still_waits_for_the_api_server(tmp_path: Path, number: signal.Signals) -> None:
    """As process 1 of a container it would not even be killed by a signal that it does not handle."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", silent.getsockname()[1])
        command = [sys.executable, "-m", "lora_operator", f"--kubeconfig={kubeconfig}", "--http-port=0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
            try:
                assert process.stderr is not None
                silent.settimeout(60)
                connection, _ = silent.accept()  # the first list, which gets no answer
                process.send_signal(number)
                _, words = process.communicate(timeout=20)
            finally:
                process.kill()
            connection.close()
    assert process.returncode == 0
    assert "asked to end before the watches began" in words
    assert "Traceback" not in words
