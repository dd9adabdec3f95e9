"""Trackers are told of a run by their real clients, and one that is down, slow or unwilling costs the run nothing."""

import http.server
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lora_api.failures import FailureClass
from lora_api.messages import ProgressLine
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer import tracker
from lora_trainer.eventfile import write_event_file
from lora_trainer.metrics import Metric
from lora_trainer.settings import Place
from lora_trainer.tracker import MLflowClient, RefusedError, serve
from lora_trainer.tracking import QUEUE_LIMIT, TrackerProcess, Trackers, flatten, opening, start_trackers
from tests.trainer.runs import SOURCES

Make = Callable[..., RunSpec]
AT = datetime(2026, 11, 25, 12, 0, 5, tzinfo=UTC)
MAIN = Place(0, 0, 1)
ADAPTER = AdapterStatus(
    uri="s3://models/x/sha256-1", digest="sha256:" + "1" * 64, version=3, served_name="x-v3", rank=4,
    serving_max_lora_rank=8, size_bytes=10, eval_loss_before=2.0, eval_loss_after=0.5,
)  # fmt: skip
LINES = [
    ProgressLine(event="eval", at=AT, step=0, eval_loss=2.0),
    ProgressLine(event="step", at=AT, step=1, loss=1.5, learning_rate=1e-3, grad_norm=0.5, tokens_per_second=10.0),
    ProgressLine(event="stage", at=AT, stage="checkpointing"),
    ProgressLine(event="step", at=AT, step=2, loss=1.0, learning_rate=5e-4),
    ProgressLine(event="eval", at=AT, step=2, eval_loss=0.5),
]
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trackers' processes find the trainer."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, SOURCES)))


def tell_all(trackers: Trackers) -> None:
    for line in LINES:
        trackers.tell(line)


# -- TensorBoard


def test_tensorboard_reads_its_event_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = [
        Metric(0, eval_loss=2.0, at="2026-11-25T12:00:00Z"),
        Metric(1, loss=1.5, learning_rate=1e-3, grad_norm=0.5, tokens_per_second=10.0, at="2026-11-25T12:00:05Z"),
        Metric(2, loss=1.0, reward_margin=0.25),
    ]
    file = write_event_file(metrics, "my.run", tmp_path)
    assert file.name == "events.out.tfevents.1795608000.my.run"
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 1.5), (2, 1.0)]
    assert [(event.step, event.wall_time) for event in read.Scalars("eval/loss")] == [(0, 1795608000.0)]
    assert [(event.step, event.value) for event in read.Scalars("reward/margin")] == [(2, 0.25)]
    assert read.Scalars("train/learning_rate")[0].value == pytest.approx(1e-3)
    assert read.Scalars("train/loss")[0].wall_time == 1795608005.0
    assert write_event_file(metrics, "my.run", tmp_path).read_bytes() == file.read_bytes()
    assert EventAccumulator(str(write_event_file([], "empty", tmp_path))).Reload().Tags()["scalars"] == []


# -- MLflow


def test_a_later_attempt_goes_on_with_the_same_mlflow_run(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client on its real file store, which it still has."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run = make_run(tracking={"mlflow": {"trackingUri": "http://replaced", "experiment": "tests"}})
    place = f"file://{tmp_path}/mlflow"

    def attempt(number: int, *batches: list[dict[str, Any]]) -> None:
        first = opening(run.model_copy(update={"attempt": number}), "mlflow", tmp_path)
        said: list[str] = []
        assert (
            serve(
                MLflowClient({**first, "settings": {**first["settings"], "trackingUri": place}}), batches, said.append
            )
            == 0
        )
        assert said == []

    def measured(step: int, **values: float) -> dict[str, Any]:
        return {"step": step, "at": f"2026-11-25T12:00:0{step}Z", "measured": values}

    attempt(1, [], [measured(1, loss=2.0)], [measured(2, loss=1.5), {"outcome": "killed", "result": {"failure": "x"}}])
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=place)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    assert [found.info.status for found in client.search_runs([experiment.experiment_id])] == ["KILLED"]
    result = {"adapter_uri": "s3://models/x", "adapter_version": 3}
    attempt(2, [measured(3, loss=1.0, grad_norm=0.5)], [{"outcome": "finished", "result": result}])
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "tests/tiny")
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert history[0].timestamp == int(datetime(2026, 11, 25, 12, 0, 1, tzinfo=UTC).timestamp() * 1000)
    assert found.data.params["training.learningRate"] == "0.01"
    assert found.data.params["lora.targetModules"] == "all-linear"
    assert {"lora_run_uid": "uid-1", "attempt": "2", "adapter_uri": "s3://models/x"}.items() <= found.data.tags.items()


# -- Weights & Biases


def read_wandb(file: Path) -> list[Any]:
    """The records of W&B's file: LevelDB's log format, 32 KiB blocks of (checksum, length, kind, content)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, offset, parts, records = file.read_bytes(), 7, b"", []
    while offset + 7 <= len(content):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
        parts += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_weights_and_biases_gets_parameters_metrics_and_the_adapter(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("LORA_TRACKING_SECONDS", "120")
    run = make_run(tracking={"wandb": {"project": "tests", "entity": "me"}})
    assert start_trackers(run, Place(1, 1, 2), tmp_path).processes == [], "rank 0 alone"
    trackers = start_trackers(run, MAIN, tmp_path)
    tell_all(trackers)
    trackers.succeed(ADAPTER)
    assert capfd.readouterr().err == ""
    (file,) = (tmp_path / "tracking" / "wandb").glob("wandb/offline-run-*/run-uid-1.wandb")
    records = read_wandb(file)
    (start,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (start.run_id, start.project, start.entity, start.display_name) == ("uid-1", "tests", "me", "tests/tiny")
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert (config["training.learningRate"], config["attempt"]) == (0.01, 1)
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows] == [
        (0, None, 2.0), (1, 1.5, None), (2, 1.0, None), (2, None, 0.5),
    ]  # fmt: skip
    assert rows[1]["tokens_per_second"] == 10.0
    summary = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert (summary["adapter_uri"], summary["adapter_version"]) == (ADAPTER.uri, 3)
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


# -- trackers that are down


class AnsweringServer(http.server.ThreadingHTTPServer):
    """Answers everything with ``status``, and notes what was asked for."""

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status = status
        self.asked: list[str] = []


class Answer(http.server.BaseHTTPRequestHandler):
    """One answer."""

    server: AnsweringServer

    def answer(self) -> None:
        self.server.asked.append(self.path)
        body = b'{"errors": [{"message": "no"}]}'
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_CONNECT = answer  # noqa: N815 - http.server's names

    def log_message(self, *args: Any) -> None:
        """Nothing on standard error, which the test reads."""


@contextmanager
def answering(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything with ``status``: its address, and what it was asked."""
    with AnsweringServer(status) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", server.asked
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def listening(*, accept: bool) -> Iterator[str]:
    """A port that takes connections and never answers, or that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if accept:
            listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


LIMIT = 15.0


def test_trackers_that_are_down_cost_a_line_and_a_bounded_time(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_TRACKING_SECONDS", str(LIMIT))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    with (
        answering(500) as (broken, _), answering(401) as (unwilling, _), answering(502) as (outside, asked_outside),
        listening(accept=True) as silent, listening(accept=False) as closed,
    ):  # fmt: skip
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, outside)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        everything = Trackers()
        began = time.monotonic()
        for number, address in enumerate((broken, unwilling, silent, closed)):
            run = make_run(
                tracking={
                    "wandb": {"project": "p", "baseUrl": address},
                    "mlflow": {"trackingUri": address, "experiment": "e"},
                }
            )
            everything.processes += start_trackers(run, MAIN, tmp_path / str(number)).processes
        assert len(everything.processes) == 8
        pids = [process._process.pid for process in everything.processes]
        tell_all(everything)
        assert time.monotonic() - began < LIMIT / 3, "telling does not wait"
        ending = time.monotonic()
        everything.succeed(ADAPTER)
        assert time.monotonic() - ending < LIMIT + 5
        assert asked_outside == [], "nothing but the trackers themselves is asked"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 8, lines
    assert all(line.startswith(("tracking: Weights & Biases: ", "tracking: MLflow: ")) for line in lines), lines
    assert all(line.endswith("; the run goes on without it") for line in lines)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)


def test_a_client_that_reads_nothing_blocks_nothing_and_is_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = TrackerProcess("X", ["sleep", "1000"], os.environ, tmp_path / "log")
    began = time.monotonic()
    for number in range(QUEUE_LIMIT + 5000):
        process.tell({"step": number, "text": "x" * 100})
    assert process.dropped > 0
    process.finish({"outcome": "finished", "result": {}}, time.monotonic() + 0.5)
    assert time.monotonic() - began < 10
    assert process._process.returncode == -9
    assert capfd.readouterr().err.count("tracking: X:") == 1


def test_a_client_that_dies_or_cannot_start_is_a_line(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    process = TrackerProcess("X", [sys.executable, "-c", "raise SystemExit(3)"], os.environ, tmp_path / "log")
    process._process.wait(30)
    process.tell({"step": 1})
    process.finish({}, time.monotonic() + 5)
    assert "tracking: X: its client ended with exit code 3; the run goes on" in capfd.readouterr().err
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    run = make_run(tracking={"mlflow": {"trackingUri": "http://127.0.0.1:1", "experiment": "e"}})
    assert start_trackers(run, MAIN, tmp_path).processes == []
    assert "tracking: MLflow: [Errno 2]" in capfd.readouterr().err
    Trackers().fail(FailureClass.INTERNAL)


class Scripted:
    """A client that fails as it is told to."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.starts = 0
        self.logged: list[int] = []
        self.ended: list[str] = []

    def start(self) -> None:
        self.starts += 1
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

    def log(self, messages: list[dict[str, Any]]) -> None:
        self.logged += [message["step"] for message in messages]

    def finish(self, outcome: str, result: dict[str, Any]) -> None:
        self.ended.append(outcome)


STEPS = [[{"step": step, "measured": {"loss": 1.0}}] for step in (1, 2, 3)]
END = [{"outcome": "failed", "result": {}}]


def test_messages_wait_for_a_tracker_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tracker, "FIRST_PAUSE", 1000.0)
    down = Scripted(ConnectionError("down"))
    assert serve(down, [*STEPS, END], said.append) == 0
    assert (down.starts, down.logged, down.ended, said) == (2, [1, 2, 3], ["failed"], ["ConnectionError: down"])

    monkeypatch.setattr(tracker, "FIRST_PAUSE", 0.0)
    back = Scripted(ConnectionError("down"), ConnectionError("down"))
    assert serve(back, [*STEPS, [], END], said.append) == 0
    assert (back.starts, back.logged) == (3, [1, 2, 3])

    never = Scripted(*[ConnectionError("down")] * 9)
    assert serve(never, [*STEPS, END], said.append) == 1
    assert never.starts == 4

    refused = Scripted(RefusedError("no key"))
    assert serve(refused, [*STEPS, END], said.append) == 1
    assert (refused.starts, said[-1]) == (1, "no key")
    assert serve(Scripted(), STEPS, said.append) == 1, "the trainer has ended without a word"

    monkeypatch.setattr(tracker, "WAITING_LIMIT", 2)
    monkeypatch.setattr(tracker, "FIRST_PAUSE", 1000.0)
    short = Scripted(ConnectionError("down"))
    assert serve(short, [*STEPS, END], said.append) == 0
    assert short.logged == [3], "the oldest are dropped"


def test_parameters_are_named_by_their_path() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": ["x", "y"]}, "e": None, "f": False}) == {
        "a.b.c": 1, "a.d": "x, y", "f": False,
    }  # fmt: skip
