"""A store that stalls or fails: every operation ends in bounded time, and a run loses no state by it."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lora_api.adapter import COMPLETE_FILE
from lora_api.run import RunSpec
from lora_trainer.errors import StoreUnavailableError
from lora_trainer.store import CHUNK, Store
from tests.support.proxy import Proxy, run_proxy
from tests.support.seaweed import Seaweed
from tests.trainer.runs import Launched, merge

Make = Callable[..., RunSpec]
Start = Callable[..., Launched]
IMPATIENT = {"LORA_STORE_TIMEOUT_SECONDS": "1", "LORA_STORE_RETRY_SECONDS": "1"}


@pytest.fixture
def proxy(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the S3 store, which this process and its pods go through, impatiently."""
    with run_proxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for name, value in IMPATIENT.items():
            monkeypatch.setenv(name, value)
        yield proxy


def through(proxy: Proxy, seaweed: Seaweed) -> dict[str, str]:
    return {**seaweed.environment, "AWS_ENDPOINT_URL": proxy.url, **IMPATIENT}


OPERATIONS: dict[str, Callable[[Store, Path], object]] = {
    "get": lambda store, scratch: store.get("there"),
    "put": lambda store, scratch: store.put("new", b"x" * 100),
    "create": lambda store, scratch: store.create("newer", b"x" * 100),
    "upload": lambda store, scratch: store.upload(scratch / "small", "small"),
    "upload in parts": lambda store, scratch: store.upload(scratch / "large", "large"),
    "list": lambda store, scratch: store.sizes(),
    "delete": lambda store, scratch: store.delete(["gone"]),
    "download": lambda store, scratch: store.download("there", scratch / "back"),
}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "small").write_bytes(b"small")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2 * CHUNK + 1)
    return tmp_path


def outcomes(uri: str, scratch: Path) -> dict[str, tuple[str, float]]:
    """How each operation ends, all at once, and after how many seconds."""

    def run(name: str) -> tuple[str, float]:
        began = time.monotonic()
        try:
            OPERATIONS[name](Store(uri), scratch)
        except StoreUnavailableError as error:
            return str(error), time.monotonic() - began
        return "", time.monotonic() - began

    with ThreadPoolExecutor(len(OPERATIONS)) as pool:
        return dict(zip(OPERATIONS, pool.map(run, OPERATIONS), strict=True))


@pytest.mark.parametrize("verdict", ["swallow", "cut", "drop"])
def test_each_operation_ends_in_bounded_time_when_the_store_stalls(
    verdict: str, proxy: Proxy, s3: Seaweed, scratch: Path
) -> None:
    uri = s3.uri(f"stalls-{verdict}")
    Store(uri).put("there", b"x" * 5000)
    proxy.judge = lambda method, path: verdict
    for name, (message, seconds) in outcomes(uri, scratch).items():
        if verdict == "cut" and name not in ("get", "list", "download"):
            continue  # the head of an answer is enough for the others
        assert "no success within" in message, (name, message)
        assert "tries" in message
        assert seconds < 12, (name, seconds)


def test_an_operation_that_stalled_once_is_tried_again(
    proxy: Proxy, s3: Seaweed, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.uri("stalls-once")
    Store(uri).put("there", b"x" * 5000)
    seen: set[tuple[str, str]] = set()
    lock = threading.Lock()

    def judge(method: str, path: str) -> str:
        with lock:
            request = method, path.partition("?")[0]  # each try to upload in parts has an id of its own
            first = request not in seen
            seen.add(request)
            return "swallow" if first else "pass"

    for name in sorted(OPERATIONS, key="delete".__eq__):
        proxy.judge = lambda method, path: "pass"
        seen.clear()
        monkeypatch.setenv("LORA_STORE_TIMEOUT_SECONDS", "5" if "parts" in name else "1")
        store = Store(uri, retry_seconds=40)
        proxy.judge = judge
        OPERATIONS[name](store, scratch)
        assert seen, name


@contextmanager
def mute_server(answer: bytes) -> Iterator[int]:
    """A port that accepts connections, says ``answer`` to whatever comes, and nothing more."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    held.append(connection)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


ANSWERS = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nLast-Modified: Wed, 25 Nov 2026 00:00:00 GMT\r\n"
    b'ETag: "a"\r\n\r\nhalf',
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_server_that_accepts_and_falls_silent(case: str, s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    with mute_server(ANSWERS[case]) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("LORA_STORE_TIMEOUT_SECONDS", "0.5")
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError, match=r"no success within \d s and 2 tries"):
            Store(s3.uri("mute"), retry_seconds=0).get("a")
        assert time.monotonic() - began < 10


def test_a_deadline_shortens_requests_and_retries(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    with mute_server(b"") as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        store = Store(s3.uri("mute"), retry_seconds=60)
        began = time.monotonic()
        with store.within(1.0):
            with pytest.raises(StoreUnavailableError):
                store.get("a")
            with pytest.raises(StoreUnavailableError):
                store.put("a", b"")
        assert time.monotonic() - began < 5
        assert store._timeout == 60


# -- runs

SAVES: dict[str, Any] = {
    "parallelism": {"nodes": 2, "gpusPerNode": 0},
    "training": {"maxSteps": 12},
    "checkpoint": {"everySteps": 2},
}


def complete_steps(seaweed: Seaweed, name: str) -> list[int]:
    paths = Store(seaweed.uri(name)).sizes()
    return sorted(int(path.split("/")[-2].removeprefix("step-")) for path in paths if path.endswith(COMPLETE_FILE))


def test_a_checkpoint_that_could_not_be_saved_does_not_end_the_run(
    make_run: Make, fork: Start, proxy: Proxy, s3: Seaweed
) -> None:
    proxy.judge = lambda method, path: "swallow" if "step-2/" in path and "optimizer" in path else "pass"
    pod = fork(make_run(**merge(SAVES, {"publish": {"store": s3.uri("one-fails")}})), **through(proxy, s3))
    assert pod.wait() == 0, pod.log.read_text()[-5000:]
    log = pod.log.read_text()
    assert "the checkpoint of step 2 could not be saved, there is none yet" in log
    assert log.count("could not be saved") == 1
    assert pod.losses.keys() == set(range(1, 13))


def test_three_that_could_not_be_saved_end_it_and_the_older_one_is_there(
    make_run: Make, fork: Start, proxy: Proxy, s3: Seaweed
) -> None:
    proxy.judge = lambda method, path: "swallow" if "COMPLETE" in path and "step-2/" not in path else "pass"
    run = make_run(**merge(SAVES, {"publish": {"store": s3.uri("three-fail")}, "training": {"maxSteps": 900}}))
    pod = fork(run, **through(proxy, s3))
    assert pod.wait() == 74, pod.log.read_text()[-5000:]
    assert "3 checkpoints in a row could not be saved; the last one is of step 2" in pod.words.message
    assert complete_steps(s3, "three-fail") == [2]


def test_the_last_checkpoint_before_a_stop_takes_the_time_that_is_left(
    make_run: Make, fork: Start, proxy: Proxy, s3: Seaweed
) -> None:
    run = make_run(**merge(SAVES, {"publish": {"store": s3.uri("too-late")}, "training": {"maxSteps": 900}}))
    settings = {"LORA_STOP_GRACE_SECONDS": "6", "LORA_STORE_TIMEOUT_SECONDS": "60", "LORA_STORE_RETRY_SECONDS": "60"}
    pod = fork(run, **{**through(proxy, s3), **settings})
    pod.wait_for(lambda line: line.event == "step" and (line.step or 0) > 2)
    proxy.judge = lambda method, path: "swallow" if "optimizer" in path else "pass"
    pod.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert pod.wait(30) in (74, 143), pod.log.read_text()[-5000:]
    assert time.monotonic() - began < 9
    proxy.judge = lambda method, path: "pass"
    assert complete_steps(s3, "too-late")
