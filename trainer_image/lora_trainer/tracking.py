"""Tells trackers (Weights & Biases, MLflow) of a run, without the run ever waiting for one.

Each tracker has a process of its own (``tracker``): its client may hang, fill memory, or end the process at exit, and
none of that is the run's. Messages go through a bounded queue and a thread into its standard input; what does not fit
is dropped. At the end the trackers have LORA_TRACKING_SECONDS to send the rest, and are then killed. A tracker that
fails costs one line on standard error.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lora_api.failures import FailureClass
from lora_api.messages import ProgressLine
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus, format_time
from lora_trainer.interpreter import python_command
from lora_trainer.settings import Place, tracking_seconds

QUEUE_LIMIT = 10_000
FAILED_SECONDS = 5.0
"""Seconds that the trackers of a failed run have: the pod is to end soon."""

MEASURED = (
    "epoch", "loss", "eval_loss", "eval_share", "served_loss", "served_share", "learning_rate", "grad_norm",
    "tokens_per_second", "skipped_steps", "reward_margin", "reward_accuracy",
)  # fmt: skip
PARAMETERS = ("baseModel", "dataset", "lora", "quantization", "training", "parallelism")
TITLES = {"wandb": "Weights & Biases", "mlflow": "MLflow"}

Outcome = Literal["finished", "failed", "killed"]


class TrackerProcess:
    """One tracker, from this process's side."""

    def __init__(self, title: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.title = title
        self.dropped = 0
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE_LIMIT)
        self._warned = threading.Lock()
        with log.open("wb") as output:
            # A process group of its own: SIGTERM to the pod must not cut its last messages.
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, process_group=0
            )
        tasks = (self._write, self._read)
        self._threads = [threading.Thread(target=task, name=f"tracking {title}", daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()

    def tell(self, message: dict[str, Any]) -> None:
        """Queues ``message``. Returns at once: a queue that is full drops it."""
        try:
            self._queue.put_nowait(json.dumps(message))
        except queue.Full:
            self.dropped += 1

    def finish(self, message: dict[str, Any], deadline: float) -> None:
        """Sends the last message, waits until ``deadline`` (time.monotonic) and ends the process."""
        for last in (json.dumps(message), None):
            while True:
                try:
                    self._queue.put_nowait(last)
                    break
                except queue.Full:
                    self._drop_oldest()
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
            if code:
                self.warn(f"its client ended with exit code {code}")
        except subprocess.TimeoutExpired:
            self.warn("it did not take the rest in time, and was given up")
        if self.dropped:
            self.warn(f"{self.dropped} messages were dropped")
        self.kill()

    def kill(self) -> None:
        """Ends the client and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(1.0)

    def warn(self, text: str) -> None:
        """Says on standard error what is wrong, the first time."""
        if self._warned.acquire(blocking=False):
            sys.stderr.write(f"tracking: {self.title}: {text}; the run goes on without it\n")
            sys.stderr.flush()

    def _drop_oldest(self) -> None:
        with suppress(queue.Empty):
            self._queue.get_nowait()
            self.dropped += 1

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None  # noqa: S101 - for the type checker
        with suppress(OSError):  # it has ended; finish() says so
            while (text := self._queue.get()) is not None:
                pipe.write(text.encode() + b"\n")
                pipe.flush()
        with suppress(OSError):
            pipe.close()

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None  # noqa: S101 - for the type checker
        with pipe:
            for line in pipe:
                self.warn(line.decode(errors="replace").strip())


class Trackers:
    """All trackers of a run; none on ranks other than 0."""

    def __init__(self, processes: Sequence[TrackerProcess] = ()) -> None:
        self.processes = list(processes)

    def tell(self, line: ProgressLine) -> None:
        """Passes on what was measured."""
        measured = {name: value for name in MEASURED if (value := getattr(line, name)) is not None}
        if line.event in ("step", "eval", "served") and line.step is not None and measured:
            message = {"step": line.step, "at": format_time(line.at), "measured": measured}
            for process in self.processes:
                process.tell(message)

    def succeed(self, adapter: AdapterStatus) -> None:
        """The run is published."""
        result = {
            "adapter_uri": adapter.uri,
            "merged_uri": adapter.merged_uri,
            "adapter_digest": adapter.digest,
            "adapter_version": adapter.version,
            "eval_loss_before": adapter.eval_loss_before,
            "eval_loss_after": adapter.eval_loss_after,
            "eval_share_after": adapter.eval_share_after,
            "served_loss": None if adapter.served is None else adapter.served.after.loss,
            "served_share": None if adapter.served is None else adapter.served.after.share,
        }
        self._finish("finished", {name: value for name, value in result.items() if value is not None})

    def fail(self, failure: FailureClass) -> None:
        """The attempt ended without an adapter. One that was asked to stop goes on later, under the same name."""
        self._finish("killed" if failure == FailureClass.CHECKPOINTED else "failed", {"failure": failure.value})

    def _finish(self, outcome: Outcome, result: dict[str, Any]) -> None:
        seconds = tracking_seconds() if outcome == "finished" else min(FAILED_SECONDS, tracking_seconds())
        deadline = time.monotonic() + seconds
        threads = [
            threading.Thread(target=process.finish, args=({"outcome": outcome, "result": result}, deadline))
            for process in self.processes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.processes.clear()


def start_trackers(run: RunSpec, place: Place, work: Path, env: Mapping[str, str] = os.environ) -> Trackers:
    """Starts the trackers that ``run`` asks for. One that cannot be started is left out, with a warning."""
    wanted = [name for name in TITLES if getattr(run.tracking, name) is not None]
    trackers = Trackers()
    if not place.is_main:
        return trackers
    for name in wanted:
        scratch = work / "tracking" / name
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            command = python_command("lora_trainer.tracker", name)
            process = TrackerProcess(TITLES[name], command, client_environment(scratch, env), scratch / "log")
        except OSError as error:
            sys.stderr.write(f"tracking: {TITLES[name]}: {error}; the run goes on without it\n")
            continue
        process.tell(opening(run, name, scratch))
        trackers.processes.append(process)
    return trackers


def opening(run: RunSpec, name: str, scratch: Path) -> dict[str, Any]:
    """The first message: where to log, and what the run is."""
    wire = run.to_wire()
    return {
        "settings": wire["tracking"][name],
        "uid": run.uid,
        "name": f"{run.namespace}/{run.name}",
        "attempt": run.attempt,
        "parameters": flatten({section: wire.get(section, {}) for section in PARAMETERS}),
        "scratch": str(scratch),
    }


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their path in the manifest. Lists are one text."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= flatten(inner, f"{prefix}{key}.")
        elif inner is not None:
            found[f"{prefix}{key}"] = ", ".join(map(str, inner)) if isinstance(inner, list) else inner
    return found


def client_environment(scratch: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Environment of a client: files below ``scratch``, short retries, and no reports to its makers."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    fixed = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(scratch),
        "WANDB_CACHE_DIR": str(scratch / "cache"),
        "WANDB_CONFIG_DIR": str(scratch / "config"),
        "WANDB_DATA_DIR": str(scratch / "data"),
        "PYTHONUNBUFFERED": "1",
    }
    return {**defaults, **env, **fixed}
