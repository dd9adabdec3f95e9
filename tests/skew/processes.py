"""Operators of any release as processes of their own, and when they have looked at everything."""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.skew.releases import Release
from tests.support.wait import eventually

FLAGS = (
    "--preflight=off", "--failure-grace=1", "--node-grace=2", "--restart-backoff=0.1", "--log-interval=1",
    "--progress-interval=0.3", "--confirm-after=3", "--http-host=127.0.0.1", "--http-port=0",
)  # fmt: skip


class Operator:
    """A running operator process."""

    def __init__(self, log: Path) -> None:
        self._log = log

    @property
    def log(self) -> str:
        """All that it said so far."""
        return self._log.read_text()

    def looks(self, outcome: str) -> int:
        """How often it has looked at a run, with this outcome."""
        (port,) = eventually("its port", lambda: re.findall(r"listening on port (\d+)", self.log))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.search(rf'reconcile_duration_seconds_count{{outcome="{outcome}"}} (\S+)', text)
        return int(float(found[1])) if found else 0


@contextmanager
def running(release: Release, kubeconfig: Path, namespace: str, log: Path, *flags: str) -> Iterator[Operator]:
    """The operator of ``release``, from when it knows all there is until the end of the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORA_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, release.code))
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "LORA_METRICS_AUTH": "none"}
    command = [sys.executable, "-m", "lora_operator", f"--kubeconfig={kubeconfig}", f"--namespaces={namespace}"]
    command += [f"--trainer-image={release.image}", *FLAGS, *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, stdout=output, env=environment, cwd=log.parent)
        try:
            operator = Operator(log)

            def is_ready() -> bool:
                assert process.poll() is None, operator.log
                return "ready: " in operator.log

            eventually(f"the operator of {release.name} is ready", is_ready, 60)
            yield operator
        finally:
            process.terminate()
            process.wait(timeout=30)
