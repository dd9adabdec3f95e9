"""The operators of the soak: one that is always there, started again whenever it ends, and one that comes and goes."""

import asyncio
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.scale.client import BenchError
from bench.scale.process import OperatorProcess
from bench.soak.world import in_background
from tests.skew.releases import Release

FLAGS = (
    "--failure-grace=3",
    "--node-grace=10",
    "--start-timeout=5",
    "--restart-backoff=0.5",
    "--log-interval=5",
    "--confirm-after=10",
)
"""Shorter times than the defaults, so that 200 runs live their lives in half an hour."""

_REST_SECONDS = 2.0
_START_SECONDS = 90.0
_READY = "ready: "
"""What an operator logs once its cache is complete (lora_operator.manager.app)."""

_SAMPLE_SECONDS = 1.0
_WARM_SECONDS = 2.5
"""Processor time after which an operator has done everything once, so that its memory counts.

Measured: 33 MiB after 0.3 s, 75 to 82 after 1.4, 87 after 2.5, and then 90 to the end. How long that takes depends on
what else the machine does.
"""

_WINDOW_SECONDS = 20.0


@dataclass(frozen=True)
class Sample:
    """Resident memory, in MiB, of a process at a time in seconds since the start, and processor time used."""

    at: float
    pid: int
    rss: float
    cpu: float


def find_first_look(own: Sequence[Sample], at: float) -> Sample:
    """What a process took, by its samples, soon after ``at``, or after it was warm if that was later.

    Raises:
        BenchError: it was not measured.
    """
    later = [sample for sample in own if sample.at >= at]
    if not later:
        raise BenchError(f"the operator's memory was not measured from {at:.0f} s on")
    begin = next((sample for sample in later if sample.cpu >= _WARM_SECONDS), later[-1])
    window = [sample.rss for sample in later if begin.at <= sample.at < begin.at + _WINDOW_SECONDS]
    return replace(begin, rss=statistics.median(window))


class Operators:
    """Starts operators, and watches the one that is always there: first that of ``release``."""

    def __init__(self, kubeconfig: Path, logs: Path, release: Release, say: Callable[[str], None]) -> None:
        self._kubeconfig = kubeconfig
        self._release = release
        self._logs = logs
        self._say = say
        self._begin = time.monotonic()
        self._held = asyncio.Lock()
        self.started = 0
        self.main = self.start("operator")
        self.samples: list[Sample] = []
        self.failed_starts = 0
        self.failures: list[str] = []
        """Last words of operators that ended by themselves though they had been ready."""

    def start(self, name: str, release: Release | None = None) -> OperatorProcess:
        """Another operator, whose log begins with ``name``: of ``release``, or of the one that is installed."""
        self.started += 1
        chosen = release or self._release
        log = self._logs / f"{name}-{self.started}-{chosen.name}.log"
        flags = (*FLAGS, f"--trainer-image={chosen.image}")
        return OperatorProcess(
            self._kubeconfig,
            log,
            rest_seconds=_REST_SECONDS,
            flags=flags,
            code=[path.absolute() for path in chosen.code],
        )

    async def change(self, release: Release) -> None:
        """Ends the operator, once it has been ready, and starts that of ``release``, as a Deployment does.

        From now on all operators that are started are of ``release``: one that lives on beside runs that its release
        does not know may end them otherwise.
        """
        self._release = release
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if _READY in self.main.log.read_text() or time.monotonic() > deadline:
                break
            await asyncio.sleep(_SAMPLE_SECONDS / 4)
        async with self._held:
            await asyncio.to_thread(self.main.stop)
            self.main = self.start("operator")

    async def watch(self) -> None:
        """Starts the operator again when it ends, as its kubelet does, and measures it, until it is cancelled."""
        while True:
            async with self._held:
                if self._note_end(self.main):
                    self.main.stop(signal.SIGKILL)
                    self.main = self.start("operator")
            self._sample()
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def kill(self, away: float) -> None:
        """Kills the operator, and starts it again after ``away`` seconds."""
        async with self._held:
            await asyncio.to_thread(self.main.stop, signal.SIGKILL)
            await asyncio.sleep(away)
            self.main = self.start("operator")

    async def freeze(self, seconds: float) -> None:
        """Stops the operator in its tracks for a while, as a machine that is overloaded does."""
        async with self._held:
            self.main.send(signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.main.send(signal.SIGCONT)

    async def double(self, seconds: float, number: signal.Signals, release: Release | None = None) -> None:
        """Runs a second operator, maybe of another ``release``, for a while, which then is ended by a signal."""
        second = self.start("second", release)
        try:
            await asyncio.sleep(seconds)
            self._note_end(second)
        finally:
            await asyncio.to_thread(second.stop, number)

    def first_look(self, at: float) -> Sample:
        """What the operator that is there now took soon after ``at`` (``find_first_look``)."""
        return find_first_look([sample for sample in self.samples if sample.pid == self.main.pid], at)

    def every_minute(self) -> list[float]:
        """Resident memory at the start of each minute, in MiB, of whichever operator was there."""
        minutes = {int(sample.at // 60): sample.rss for sample in reversed(self.samples)}
        return [minutes[minute] for minute in sorted(minutes)]

    def _note_end(self, operator: OperatorProcess) -> bool:
        """Whether ``operator`` has ended by itself. One whose first LIST fails does, and may; a ready one may not."""
        if operator.exit_code is None:
            return False
        text = operator.log.read_text()
        ready = _READY in text
        self._say(f"an operator has ended with {operator.exit_code}, {'though' if ready else 'before'} it was ready")
        self.failed_starts += not ready
        self.failures += [f"an operator that was ready ended by itself: {text[-2000:]}"] if ready else []
        return True

    def _sample(self) -> None:
        try:
            usage = self.main.usage()
        except (BenchError, OSError):  # it ends just now
            return
        self.samples.append(Sample(time.monotonic() - self._begin, self.main.pid, usage.rss, usage.cpu))


@asynccontextmanager
async def run_operators(
    kubeconfig: Path, logs: Path, release: Release, say: Callable[[str], None]
) -> AsyncIterator[Operators]:
    """Operators for the length of the block."""
    operators = Operators(kubeconfig, logs, release, say)
    try:
        async with in_background(operators.watch()):
            yield operators
    finally:
        await asyncio.to_thread(operators.main.stop)
