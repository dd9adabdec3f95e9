"""The operator as it runs in its container, watched from outside."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.scale.client import BenchError
from devcluster.ports import PortLease

ROOT = Path(__file__).resolve().parents[2]
TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE = 300.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Usage:
    """What a process has used: seconds of processor time, and resident memory now and at most, in MiB."""

    cpu: float
    rss: float
    peak: float


def usage(pid: int) -> Usage:
    """What ``pid`` has used so far, by /proc.

    Raises:
        BenchError: it has ended.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE)
    memory = {name: int(kib) / 1024 for name, kib in found}
    if not memory:
        raise BenchError(f"process {pid} has ended")
    return Usage((int(fields[11]) + int(fields[12])) / TICKS, memory["VmRSS"], memory["VmHWM"])


class OperatorProcess:
    """``python -m lora_operator``, with ``flags`` over its defaults. ``samples`` runs it under a profiler.

    ``code``: where its modules are, if not in this repository.
    """

    def __init__(
        self,
        kubeconfig: Path,
        log: Path,
        *,
        rest_seconds: float,
        namespaces: Sequence[str] = (),
        samples: Path | None = None,
        flags: Sequence[str] = ("--preflight=off",),
        code: Sequence[Path] = (),
    ) -> None:
        self._rest_seconds = rest_seconds
        self._samples = samples
        self._parts = 0
        self._lease = PortLease()
        self._log = log.open("a")
        program = ["-m", "lora_operator"] if samples is None else ["-m", "bench.scale.sampled", str(samples)]
        arguments = [f"--kubeconfig={kubeconfig}", f"--http-port={self._lease.port}", "--http-host=127.0.0.1"]
        arguments += flags
        if namespaces:
            arguments.append(f"--namespaces={','.join(namespaces)}")
        # In the environment, as the release before has no such flag.
        environment = {**build_environment(), "LORA_METRICS_AUTH": "none"}
        if code:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, code))
        self.started = time.monotonic()
        self._process = subprocess.Popen([sys.executable, *program, *arguments], env=environment, stderr=self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def log(self) -> Path:
        """Where it writes."""
        return Path(self._log.name)

    @property
    def exit_code(self) -> int | None:
        """What it ended with; ``None`` while it runs."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal, if it has not ended."""
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it as Kubernetes does, or with another signal."""
        self._process.send_signal(number)
        try:
            self._process.wait(_STOP_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()
            self._lease.release()

    async def end_part(self) -> None:
        """Has the profiler, where there is one, write down its samples so far, and begin anew."""
        if self._samples is None:
            return
        self._parts += 1
        self._process.send_signal(signal.SIGUSR1)
        while len(list(self._samples.glob("*.json"))) < self._parts:
            if self._process.poll() is not None:
                raise BenchError(f"the operator has ended: {self._last_words()}")
            await asyncio.sleep(0.1)

    def usage(self) -> Usage:
        """What it has used so far."""
        return usage(self._process.pid)

    def metrics(self) -> dict[str, float]:
        """Its own metrics, by name and labels; empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._lease.port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        return {name: float(value) for name, value in re.findall(r"^(lora_\S+) (\S+)$", text, re.MULTILINE)}

    def looks(self, *, while_due: bool = False) -> float:
        """How many looks at a run it has taken; -1 while others are due, or while it does not answer."""
        metrics = self.metrics()
        if not metrics or (metrics["lora_operator_queue_depth"] and not while_due):
            return -1
        name = "lora_operator_reconcile_duration_seconds_count"
        return sum(value for metric, value in metrics.items() if metric.startswith(name))

    async def settle(self, looks: int, *, while_due: bool = False) -> float:
        """Waits until it has looked at ``looks`` runs and none is due; returns the seconds since its start.

        ``while_due``: others may be due, as they always are where gangs run.

        Raises:
            BenchError: it has not for long, or has ended.
        """
        while await asyncio.to_thread(self.looks, while_due=while_due) < looks:
            ended = self._process.poll() is not None
            if ended or time.monotonic() - self.started > _PATIENCE:
                why = "the operator has ended" if ended else f"the operator has not looked at {looks} runs"
                raise BenchError(f"{why}: {self._last_words()}")
            await asyncio.sleep(0.1)
        return time.monotonic() - self.started

    def _last_words(self) -> str:
        return self.log.read_text()[-2000:]

    async def rest(self) -> None:
        """Waits until it looks at no run, and uses hardly any processor time, for ``rest_seconds``.

        It is asked, since one that gets no processor uses no time either.

        Raises:
            BenchError: it does not for long.
        """
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            looks = await asyncio.to_thread(self.looks)
            before = self.usage().cpu
            await asyncio.sleep(self._rest_seconds)
            used = self.usage().cpu - before
            if used < 0.03 * self._rest_seconds and 0 <= looks == await asyncio.to_thread(self.looks):
                return
        raise BenchError("the operator does not come to rest")


def build_environment() -> dict[str, str]:
    """The environment in which the repository's own modules are found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("crds", "operator", ""))}
