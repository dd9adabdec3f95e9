"""Runs of the trainer as the tests see them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_api.messages import ProgressLine, Termination, parse_progress_line, parse_termination
from lora_api.run import RunSpec
from lora_trainer.progress import Stage
from tests.trainer.zygote import ForkedPod, Zygote

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "crds", ROOT / "trainer_image")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, section by section; a value of ``None`` removes a field."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return {key: value for key, value in merged.items() if value is not None}


def build_run(model: Path, data: Path, directory: Path, changes: Mapping[str, Any]) -> RunSpec:
    """A run of a few seconds that publishes to a store below ``directory``; ``changes`` are merged into it."""
    document: dict[str, Any] = {
        "namespace": "tests",
        "name": "tiny",
        "uid": "uid-1",
        "baseModel": {"uri": f"file://{model}"},
        "dataset": {
            "train": {"uri": f"file://{data}/train.jsonl"},
            "eval": {"uri": f"file://{data}/eval.jsonl"},
            "maxSeqLength": 64,
        },
        "lora": {"r": 4, "alpha": 8},
        "training": {
            "maxSteps": 4,
            "learningRate": 0.01,
            "globalBatchSize": 8,
            "microBatchSize": 2,
            "scheduler": "cosine",
            "warmupRatio": 0.1,
        },
        "parallelism": {"nodes": 1, "gpusPerNode": 0},
        "checkpoint": {"everySteps": 100},
        "publish": {"store": f"file://{directory}/store"},
    }
    return RunSpec.model_validate(merge(document, dict(changes)))


@dataclass
class Launched:
    """A pod of the trainer: the launcher as a process of its own, and what it said."""

    process: "subprocess.Popen[str] | ForkedPod"
    log: Path
    words_file: Path

    @property
    def lines(self) -> list[ProgressLine]:
        """Progress so far."""
        found = map(parse_progress_line, self.log.read_text().splitlines())
        return [line for line in found if line is not None]

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {line.step: line.loss for line in self.lines if line.event == "step" and line.step and line.loss}

    @property
    def words(self) -> Termination:
        """The termination message."""
        words = parse_termination(self.words_file.read_text())
        assert words is not None, self.log.read_text()[-5000:]
        return words

    def wait(self, timeout: float = 180) -> int:
        """The exit code."""
        return self.process.wait(timeout)

    def wait_for(self, what: Callable[[ProgressLine], bool], timeout: float = 180) -> None:
        """Returns when some progress line is ``what``."""
        deadline = time.monotonic() + timeout
        while not any(what(line) for line in self.lines):
            ended = self.process.poll() is not None or time.monotonic() > deadline
            assert not ended, self.log.read_text()[-5000:]
            time.sleep(0.02)  # between looks at a condition

    def wait_text(self, text: str, timeout: float = 180) -> None:
        """Returns when the log has ``text``."""
        deadline = time.monotonic() + timeout
        while text not in self.log.read_text():
            ended = self.process.poll() is not None or time.monotonic() > deadline
            assert not ended, self.log.read_text()[-5000:]
            time.sleep(0.005)  # between looks at a condition

    def wait_stage(self, stage: Stage, times: int = 1) -> None:
        """Returns when ``stage`` was reported so often."""
        deadline = time.monotonic() + 180
        while [line.stage for line in self.lines].count(stage) < times:
            ended = self.process.poll() is not None or time.monotonic() > deadline
            assert not ended, self.log.read_text()[-5000:]
            time.sleep(0.005)  # between looks at a condition

    def wait_step(self, step: int) -> None:
        """Returns when ``step`` was reported."""
        self.wait_for(lambda line: (line.step or 0) >= step and line.event == "step")

    @property
    def workers(self) -> list[int]:
        """Process ids of the training processes, read from the kernel."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]


def wait_gone(pid: int) -> None:
    """Returns when the process has ended, or waits as a zombie for a parent that is not ours."""
    deadline = time.monotonic() + 10
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        assert time.monotonic() < deadline, f"process {pid} outlived its launcher"
        time.sleep(0.05)  # between looks at a condition


@contextmanager
def start_pod(
    run: RunSpec,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    zygote: Zygote | None = None,
    entry: str = "",
) -> Iterator[Launched]:
    """Starts the launcher as in a pod, with its files in ``directory``. It is killed afterwards if it still runs.

    With a ``zygote`` it is forked, in a moment; ``entry`` (MODULE:FUNCTION) may then stand for the training process.
    """
    directory.mkdir()
    document = directory / "run.json"
    document.write_text(json.dumps(run.to_wire()))
    log = directory / "log"
    own = {
        "LORA_WORK": str(directory / "work"),
        "LORA_TERMINATION_LOG": str(directory / "termination-log"),
        "LORA_PEER_GRACE_SECONDS": "20",
        **(environment or {}),
    }
    process: subprocess.Popen[str] | ForkedPod
    if zygote is not None:
        log.touch()
        process = zygote.start(document, own, log, entry)
    else:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES)), **own}
        command = [sys.executable, "-m", "lora_trainer", "launch", str(document)]
        with log.open("w") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        yield Launched(process, log, directory / "termination-log")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
