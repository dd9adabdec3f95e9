"""The process of one tracker: ``python -m lora_trainer.tracker wandb|mlflow``, started by ``tracking``.

It reads messages from standard input, a JSON object a line: first what the run is, then what was measured, at last how
it ended. What goes wrong is one line on standard output. A tracker that is down is tried again with growing pauses; the
messages wait here meanwhile. Imports no torch.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol

Message = dict[str, Any]

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
WAITING_LIMIT = 10_000
"""Messages that wait for a tracker that is down. The oldest are dropped."""

REFUSALS = (401, 403)
UID_TAG = "lora_run_uid"
MLFLOW_BATCH = 100
"""Parameters in one request; of metrics MLflow takes 1000."""


class RefusedError(Exception):
    """Trying again cannot help."""


class Client(Protocol):
    """What a tracker can be told. Everything may be told again after an error."""

    def start(self) -> None:
        """Creates the run, or goes on with it."""

    def log(self, messages: list[Message]) -> None:
        """Logs what was measured."""

    def finish(self, outcome: str, result: dict[str, Any]) -> None:
        """Logs how the run ended, and returns once the tracker has everything."""


class WandBClient:
    """Weights & Biases. The run's uid is its id there, so that a later attempt goes on with it."""

    def __init__(self, opening: Message) -> None:
        self.opening = opening
        self.run: Any = None

    def start(self) -> None:
        """Calls wandb.init.

        Raises:
            RefusedError: there is no key, or it is refused.
        """
        import wandb

        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        if not offline and not os.environ.get("WANDB_API_KEY"):
            raise RefusedError("there is no WANDB_API_KEY: put it into the Secret of spec.credentials")
        settings, scratch = self.opening["settings"], self.opening["scratch"]
        options: dict[str, Any] = {"base_url": settings["baseUrl"]} if settings.get("baseUrl") else {}
        try:
            self.run = wandb.init(
                project=settings["project"],
                entity=settings.get("entity"),
                id=self.opening["uid"],
                name=self.opening["name"],
                resume=None if offline else "allow",
                dir=scratch,
                config={**self.opening["parameters"], "attempt": self.opening["attempt"]},
                settings=wandb.Settings(
                    **options,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    disable_job_creation=True,
                    init_timeout=10,
                    login_timeout=10,
                    silent=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                ),
            )
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise RefusedError(f"{first_line(error)}; check WANDB_API_KEY in the Secret of spec.credentials") from error
        # Steps are numbers of our own: W&B drops what it takes to be in the past, as after a restart.
        self.run.define_metric("*", step_metric="step")

    def log(self, messages: list[Message]) -> None:
        """Hands the messages to W&B's own process, which sends them."""
        for message in messages:
            self.run.log({**message["measured"], "step": message["step"]})

    def finish(self, outcome: str, result: dict[str, Any]) -> None:
        """Waits until W&B has everything."""
        self.run.summary.update(result)
        if outcome == "killed":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if outcome == "finished" else 1)


class MLflowClient:
    """MLflow. The run's uid is a tag, by which a later attempt finds it."""

    def __init__(self, opening: Message) -> None:
        self.opening = opening
        self.client: Any = None
        self.run_id = ""

    def start(self) -> None:
        """Finds or creates experiment and run.

        Raises:
            RefusedError: the credentials are refused.
        """
        from mlflow.tracking import MlflowClient as Library

        settings, uid = self.opening["settings"], self.opening["uid"]
        self.client = Library(tracking_uri=settings["trackingUri"])
        with refusals():
            experiment = self._experiment(settings["experiment"])
            found = self.client.search_runs([experiment], f"tags.{UID_TAG} = '{uid}'", max_results=1)
            if found:
                self.run_id = found[0].info.run_id
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                tags = {UID_TAG: uid}
                self.run_id = self.client.create_run(experiment, tags=tags, run_name=self.opening["name"]).info.run_id
            self.client.set_tag(self.run_id, "attempt", self.opening["attempt"])
            self._log_parameters(self.opening["parameters"])

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        for _ in range(2):
            found = self.client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(self.client.create_experiment(name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run may have been faster
                    raise
        raise RefusedError(f"the experiment {name} was deleted; restore it, or set another tracking.mlflow.experiment")

    def _log_parameters(self, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(name, str(value)) for name, value in parameters.items()]
        for start in range(0, len(entries), MLFLOW_BATCH):
            self.client.log_batch(self.run_id, params=entries[start : start + MLFLOW_BATCH])

    def log(self, messages: list[Message]) -> None:
        """Sends the messages. The same one twice is one point: MLflow knows it by step, time and value."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(datetime.fromisoformat(message["at"]).timestamp() * 1000), message["step"])
            for message in messages
            for name, value in message["measured"].items()
        ]
        with refusals():
            for start in range(0, len(metrics), MLFLOW_BATCH * 10):
                self.client.log_batch(self.run_id, metrics=metrics[start : start + MLFLOW_BATCH * 10])

    def finish(self, outcome: str, result: dict[str, Any]) -> None:
        """Sets the result as tags, and the run's status."""
        for name, value in result.items():
            self.client.set_tag(self.run_id, name, value)
        self.client.set_terminated(self.run_id, status=outcome.upper())


CLIENTS: dict[str, Callable[[Message], Client]] = {"wandb": WandBClient, "mlflow": MLflowClient}


class refusals:  # noqa: N801 - used as a function
    """Turns MLflow's errors for bad credentials into RefusedError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        status = getattr(error, "get_http_status_code", lambda: None)()
        if status in REFUSALS:
            raise RefusedError(
                f"{first_line(error)}; check MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, in the Secret of spec.credentials"
            ) from error


def serve(client: Client, batches: Iterable[list[Message]], say: Callable[[str], None]) -> int:
    """Passes ``batches`` on until the last message. Returns the exit code.

    An error is said, and the messages wait until the tracker takes them. After the last message there is one more try.
    """
    waiting: list[Message] = []
    started, pause, next_try = False, FIRST_PAUSE, 0.0
    for batch in batches:
        waiting = (waiting + batch)[-WAITING_LIMIT:]
        last = waiting[-1] if waiting and "outcome" in waiting[-1] else None
        if last is None and ((not waiting and started) or time.monotonic() < next_try):
            continue
        try:
            if not started:
                client.start()
                started = True
            client.log([message for message in waiting if "measured" in message])
            if last is not None:
                client.finish(last["outcome"], last["result"])
                return 0
            waiting, pause = [], FIRST_PAUSE
        except RefusedError as error:
            say(first_line(error))
            return 1
        except Exception as error:  # noqa: BLE001 - a client may raise anything
            say(f"{type(error).__name__}: {first_line(error)}")
            if last is not None:
                return 1
            next_try, pause = time.monotonic() + pause, min(pause * 2, LONGEST_PAUSE)
    return 1


def read_batches(lines: IO[str]) -> Iterator[list[Message]]:
    """Whatever has come since the last batch, at least once a second, also nothing. Ends with the last message."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            arrived.put(line)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        texts: list[str | None] = []
        try:
            texts.append(arrived.get(timeout=1.0))
            while True:
                texts.append(arrived.get_nowait())
        except queue.Empty:
            pass
        ended = None in texts
        yield [json.loads(text) for text in texts if text is not None]


def first_line(error: BaseException | None) -> str:
    """What ``error`` says, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def take_pipes() -> tuple[IO[str], IO[str]]:
    """Standard input and output, for this process alone: the clients start processes that would hold them open."""
    source, target = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return source, target


def main(name: str) -> int:
    """The process of the tracker ``name``."""
    from lora_trainer.worker import end_with_parent

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    source, target = take_pipes()

    def say(text: str) -> None:
        target.write(" ".join(text.split()) + "\n")
        target.flush()

    opening = json.loads(source.readline())
    os.chdir(Path(opening["scratch"]))
    return serve(CLIENTS[name](opening), read_batches(source), say)


if __name__ == "__main__":
    CODE = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(CODE)  # clients register work for the end of the process, which may wait for a tracker that is down
