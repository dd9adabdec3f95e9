"""Runs a training program and measures it from outside, both sides of a comparison with the same instrument."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.25
TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A program that is measured failed, or said nothing that can be measured."""


@dataclass(frozen=True)
class Step:
    """One optimizer step as it was reported.

    ``at`` and ``cpu`` are seconds since the start: of the clock, and of processor time over all processes. ``tokens``
    counts all tokens since training began, padding left out.
    """

    step: int
    loss: float
    at: float
    cpu: float
    tokens: float


@dataclass(frozen=True)
class Watched:
    """A finished program. ``peak_mib`` is the resident memory of the largest of its processes."""

    steps: list[Step]
    peak_mib: float

    @property
    def first_step_seconds(self) -> float:
        """From the program's start to the end of its first optimizer step."""
        return self.steps[0].at

    @property
    def trained_tokens(self) -> float:
        """Tokens after the first step, which also pays for what is made once."""
        return self.steps[-1].tokens - self.steps[0].tokens

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first step."""
        return self.trained_tokens / (self.steps[-1].at - self.steps[0].at)

    @property
    def tokens_per_cpu_second(self) -> float:
        """The same by processor time, which other programs on the machine change little."""
        return self.trained_tokens / (self.steps[-1].cpu - self.steps[0].cpu)


def watch(command: Sequence[str], env: Mapping[str, str], log: Path, limit: float) -> Watched:
    """Runs ``command`` to its end; its output goes to ``log``.

    Raises:
        BenchError: it failed, took longer than ``limit`` seconds, or reported fewer than two steps.
    """
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=output, text=True)
        watcher = _Memory(process.pid)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            steps: list[Step] = []
            for line in process.stdout:
                at = time.monotonic() - started
                output.write(line)
                if (found := parse_step(line)) is not None:
                    before = steps[-1] if steps else Step(0, 0.0, 0.0, 0.0, 0.0)
                    tokens = found["tokens"] if "tokens" in found else before.tokens + found["rate"] * (at - before.at)
                    steps.append(Step(found["step"], found["loss"], at, cpu_seconds(process.pid), tokens))
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            peak = watcher.stop()
    if code or len(steps) < 2:
        end = log.read_text(encoding="utf-8")[-3000:]
        raise BenchError(f"{' '.join(command)}: exit code {code} after {len(steps)} steps and {limit:.0f} s: {end}")
    return Watched(steps, peak)


def parse_step(line: str) -> dict[str, Any] | None:
    """Step, loss, and tokens so far or tokens a second, from a line of either program; ``None`` for other lines."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if isinstance(ours := value.get("lora"), dict):
        if ours.get("event") != "step":
            return None
        return {"step": ours["step"], "loss": ours["loss"], "rate": ours["tokensPerSecond"]}
    return value if {"step", "loss", "tokens"} <= value.keys() else None


class _Memory:
    """Follows the peak of resident memory of a process and its descendants (VmHWM, kept by the kernel)."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._ended = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            for pid in process_tree(self._pid):
                self._peak = max(self._peak, peak_mib(pid))

    def stop(self) -> float:
        """The peak in MiB."""
        self._ended.set()
        self._thread.join()
        return self._peak


def process_tree(root: int) -> Iterator[int]:
    """Process ids of ``root`` and all its descendants that live."""
    yield root
    for task in _read(Path(f"/proc/{root}/task")):
        for child in task.split():
            yield from process_tree(int(child))


def _read(tasks: Path) -> Iterator[str]:
    try:
        for task in tasks.iterdir():
            yield (task / "children").read_text()
    except OSError:
        return


def peak_mib(pid: int) -> float:
    """Most resident memory that the process had so far, in MiB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def cpu_seconds(root: int) -> float:
    """Processor time of a process and its living descendants, in seconds."""
    total = 0.0
    for pid in process_tree(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total
