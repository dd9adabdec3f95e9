"""Two processes that are stopped or killed at any moment go on to the same bytes as two that were not."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_api.adapter import COMPLETE_FILE
from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_trainer.checkpoint import Checkpoints
from lora_trainer.launch import free_port
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.speed import SPEED_VARIABLE
from lora_trainer.store import Store, describe_file
from tests.support.proxy import Proxy, run_proxy
from tests.support.seaweed import Seaweed
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import Launched, build_run, merge, start_pod, wait_gone
from tests.trainer.zygote import Zygote

Make = Callable[..., RunSpec]
Start = Callable[..., Launched]
TWO = {"parallelism": {"nodes": 2, "gpusPerNode": 0}}
KILLS = 20


def succeed(pod: Launched) -> str:
    """The digest that a pod published."""
    assert pod.wait() == 0, pod.log.read_text()[-5000:]
    assert pod.words.adapter is not None
    return pod.words.adapter.digest


def stopped(pod: Launched) -> str:
    """What a pod said that ended with 75."""
    assert pod.wait() == 75, pod.log.read_text()[-5000:]
    assert pod.words.failure_class == FailureClass.CHECKPOINTED
    return pod.words.message


def complete_steps(run: RunSpec) -> list[int]:
    """Steps of the complete checkpoints in the store."""
    paths = Store(run.publish.store).sizes(f"tests/tiny/checkpoints/{run.uid}")
    return sorted(int(path.split("/")[-2].removeprefix("step-")) for path in paths if path.endswith(COMPLETE_FILE))


def attempt(run: RunSpec, number: int) -> RunSpec:
    return run.model_copy(update={"attempt": number})


# -- twenty kills

LONG: dict[str, Any] = {
    **TWO,
    "lora": {"dropout": 0.1},
    "training": {"maxSteps": 60, "evalEverySteps": 7, "globalBatchSize": 4, "loggingSteps": 2},
    "checkpoint": {"everySteps": 2, "keep": 1},
}


def test_twenty_kills_change_no_byte_of_the_adapter(model: Path, data: Path, tmp_path: Path, zygote: Zygote) -> None:
    """Those that are killed make their batches ahead, the one that is not does not."""
    ahead = {SPEED_VARIABLE: "prefetch"}

    def build(store: str) -> RunSpec:
        return build_run(model, data, tmp_path, merge(LONG, {"publish": {"store": f"file://{tmp_path}/{store}"}}))

    with start_pod(build("whole"), tmp_path / "whole-pod", zygote=zygote) as pod:
        whole = succeed(pod)
    run, dice, starts = build("killed"), random.Random(20), []
    for number in range(1, KILLS + 1):
        with start_pod(attempt(run, number), tmp_path / f"pod-{number}", ahead, zygote=zygote) as pod:
            lines = dice.randint(2, 18)
            deadline = time.monotonic() + 120
            while len(pod.lines) < lines and pod.process.poll() is None:
                assert time.monotonic() < deadline, pod.log.read_text()[-3000:]
                time.sleep(0.002)  # between looks at a condition
            workers = pod.workers
            pod.process.kill()
            assert pod.process.wait() == -signal.SIGKILL, pod.log.read_text()[-3000:]
            for pid in workers:
                wait_gone(pid)
            starts.append(min(pod.losses, default=0))
    assert len({start for start in starts if start}) > KILLS // 4, f"hardly any attempt went on: {starts}"
    with start_pod(attempt(run, KILLS + 1), tmp_path / "last", ahead, zygote=zygote) as pod:
        assert succeed(pod) == whole
    assert complete_steps(run) == []


# -- SIGTERM


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation set that takes a second or two."""
    return write_rows(tmp_path_factory.mktemp("many") / "many.jsonl", make_rows(300, start=300))


@pytest.fixture
def short(make_run: Make, many: Path) -> Make:
    """Runs of six steps with long evaluations."""
    base = {**TWO, "dataset": {"eval": {"uri": f"file://{many}"}}, "training": {"maxSteps": 6}}
    return lambda **changes: make_run(**merge(base, changes))


@pytest.fixture(scope="module")
def uninterrupted(
    model: Path, data: Path, many: Path, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Launched]:
    """Six steps with nothing in their way."""
    directory = tmp_path_factory.mktemp("whole")
    changes = {**TWO, "dataset": {"eval": {"uri": f"file://{many}"}}, "training": {"maxSteps": 6}}
    with start_pod(build_run(model, data, directory, changes), directory / "pod", zygote=zygote) as pod:
        succeed(pod)
        yield pod


@pytest.fixture
def proxy(s3: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the S3 store."""
    with run_proxy(s3.port) as proxy:
        yield proxy


def holding(proxy: Proxy, seaweed: Seaweed, method: str, part: str) -> dict[str, str]:
    """Lets the proxy hold requests with ``method`` whose path has ``part``. Returns the environment of a client."""
    proxy.judge = lambda found, path: (
        "hold" if found == method and part in path and not proxy.release.is_set() else "pass"
    )
    return {**seaweed.environment, "AWS_ENDPOINT_URL": proxy.url}


def test_it_says_which_checkpoint_is_complete(make_run: Make, fork: Start) -> None:
    run = make_run(**TWO, training={"maxSteps": 400, "loggingSteps": 1}, checkpoint={"everySteps": 2})
    pod = fork(run)
    pod.wait_for(lambda line: line.event == "step" and (line.step or 0) >= 5)
    told = {line.step: line.checkpoint_step for line in pod.lines if line.event == "step"}
    assert [told[step] for step in (1, 2, 3, 5)] == [None, None, 2, 4]
    pod.process.send_signal(signal.SIGTERM)
    stopped(pod)
    [newest] = complete_steps(run)[-1:]
    assert pod.words.checkpoint_step == newest
    again = fork(attempt(run, 2))
    again.wait_for(lambda line: line.event == "step")
    [first] = [line for line in again.lines if line.event == "step"][:1]
    assert (first.step, first.checkpoint_step) == (newest + 1, newest)
    again.process.send_signal(signal.SIGTERM)
    stopped(again)


@pytest.mark.parametrize("target", ["launcher", 0, 1])
def test_asked_to_stop_while_a_model_is_loaded(
    target: str | int, short: Make, fork: Start, s3: Seaweed, proxy: Proxy, model: Path
) -> None:
    environment = holding(proxy, s3, "GET", "model.safetensors")
    pod = fork(short(baseModel={"uri": s3.upload(model, "base/held")}), **environment)
    proxy.wait_for("hold")
    began = time.monotonic()
    os.kill(pod.process.pid if target == "launcher" else pod.workers[int(target)], signal.SIGTERM)
    assert "nothing more to save" in stopped(pod)
    assert time.monotonic() - began < 10


def test_asked_to_stop_while_one_pod_of_two_loads(
    short: Make, fork: Start, s3: Seaweed, proxy: Proxy, model: Path
) -> None:
    run = short(baseModel={"uri": s3.upload(model, "base/held")})
    place = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    pods = [fork(run, PET_NODE_RANK="0", **place, **s3.environment)]
    pods.append(fork(run, PET_NODE_RANK="1", **place, **holding(proxy, s3, "GET", "model.safetensors")))
    proxy.wait_for("hold")
    pods[1].process.send_signal(signal.SIGTERM)
    for pod in pods:
        stopped(pod)


@pytest.mark.parametrize("turn", ["first", "last"])
def test_asked_to_stop_in_an_evaluation_that_stands_alone(
    turn: str, short: Make, fork: Start, uninterrupted: Launched
) -> None:
    """The last evaluation is that of rank 0, which told of it: rank 1 may still be at the end of training."""
    run = short()
    pod = fork(run)
    pod.wait_stage("evaluating", 1 if turn == "first" else 2)
    os.kill(pod.workers[1 if turn == "first" else 0], signal.SIGTERM)
    assert "nothing more to save" in stopped(pod)
    assert complete_steps(run) == ([] if turn == "first" else [6])
    if turn == "last":
        assert uninterrupted.words.adapter is not None
        assert succeed(fork(attempt(run, 2))) == uninterrupted.words.adapter.digest


def test_asked_to_stop_in_an_evaluation_in_between(short: Make, fork: Start, uninterrupted: Launched) -> None:
    run = short(training={"evalEverySteps": 3})
    pod = fork(run)
    pod.wait_stage("evaluating", 2)
    os.kill(pod.workers[0], signal.SIGTERM)
    assert "the checkpoint of step 3 is complete" in stopped(pod)
    assert complete_steps(run) == [3]
    again = fork(attempt(run, 2))
    assert uninterrupted.words.adapter is not None
    assert succeed(again) == uninterrupted.words.adapter.digest
    assert [line.step for line in again.lines if line.event == "eval"] == [0, 3, 6]
    assert min(again.losses) == 4


def test_asked_to_stop_while_a_checkpoint_is_saved_and_again(
    short: Make, fork: Start, s3: Seaweed, proxy: Proxy
) -> None:
    run = short(publish={"store": s3.uri("held-save")}, checkpoint={"everySteps": 2}, uid="held-save")
    pod = fork(run, **holding(proxy, s3, "PUT", "optimizer.safetensors"))
    proxy.wait_for("hold")
    os.kill(pod.workers[0], signal.SIGTERM)
    pod.wait_text("asked to stop by SIGTERM")
    pod.wait_text("asked to stop by rank 0")
    pod.process.send_signal(signal.SIGTERM)
    proxy.release.set()
    assert "the checkpoint of step 2 is complete" in stopped(pod)
    assert complete_steps(run) == [2]


def test_asked_to_stop_while_the_adapter_is_published(short: Make, fork: Start, s3: Seaweed, proxy: Proxy) -> None:
    run = short(publish={"store": s3.uri("held-publish")}, uid="held-publish")
    pod = fork(run, **holding(proxy, s3, "PUT", "adapter_model.safetensors"))
    proxy.wait_for("hold")
    pod.process.send_signal(signal.SIGTERM)
    pod.wait_text("asked to stop by SIGTERM")
    proxy.release.set()
    succeed(pod)


def test_pods_that_are_asked_to_stop_at_different_steps(make_run: Make, fork: Start) -> None:
    run = make_run(**TWO, training={"maxSteps": 500})
    place = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    pods = [fork(run, PET_NODE_RANK=str(rank), **place) for rank in range(2)]
    pods[0].wait_step(3)
    pods[1].process.send_signal(signal.SIGTERM)
    pods[0].process.send_signal(signal.SIGTERM)
    messages = {stopped(pod) for pod in pods}
    (step,) = complete_steps(run)
    assert messages == {f"asked to stop; the checkpoint of step {step} is complete"}


# -- another number of processes

SIZES = {"two to one": (2, 1), "one to two": (1, 2), "two to four": (2, 4)}


@pytest.mark.parametrize("case", SIZES)
def test_going_on_with_another_number_of_processes(
    case: str, make_run: Make, fork: Start, uninterrupted: Launched, short: Make
) -> None:
    before, after = SIZES[case]
    run = short(checkpoint={"everySteps": 3}, parallelism={"nodes": before})
    first = fork(run)
    first.wait_stage("checkpointing")
    first.wait_step(4)
    first.process.kill()
    first.process.wait()
    document = attempt(run, 2).to_wire()
    document["parallelism"]["nodes"] = after
    second = fork(RunSpec.model_validate(document))
    succeed(second)
    assert min(second.losses) == 4
    assert {**first.losses, **second.losses} == pytest.approx(uninterrupted.losses, abs=1e-5)


# -- which checkpoint, and when


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    short: Make, fork: Start, uninterrupted: Launched
) -> None:
    run = short(checkpoint={"everySteps": 2})
    first = fork(run)
    first.wait_step(5)
    first.process.kill()
    first.process.wait()
    assert complete_steps(run)[-2:] == [2, 4]
    (file,) = Path(run.publish.store.removeprefix("file://")).rglob("step-4/optimizer.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    second = fork(attempt(run, 2))
    assert uninterrupted.words.adapter is not None
    assert succeed(second) == uninterrupted.words.adapter.digest
    assert min(second.losses) == 3
    assert "the checkpoint of step 4 is damaged and is passed over" in second.log.read_text()


def test_a_checkpoint_with_the_state_of_another_is_passed_over(make_run: Make, fork: Start) -> None:
    """Attack: who can write to the store puts other JSON, and its digest, where the state of a checkpoint was."""
    run = make_run(checkpoint={"everySteps": 2}, training={"maxSteps": 40})
    first = fork(run)
    first.wait_step(5)
    first.process.kill()
    first.process.wait()
    newest = complete_steps(run)[-1]
    (file,) = Path(run.publish.store.removeprefix("file://")).rglob(f"step-{newest}/loop.json")
    file.write_text("{}")
    marker = json.loads((file.parent / COMPLETE_FILE).read_text())
    entry = next(entry for entry in marker["files"] if entry["path"] == file.name)
    entry.update(describe_file(file, file.name).to_wire())
    (file.parent / COMPLETE_FILE).write_text(json.dumps(marker))
    second = fork(attempt(run, 2))
    succeed(second)
    assert f"the checkpoint of step {newest} is damaged and is passed over" in second.log.read_text()


def test_checkpoints_by_the_clock(make_run: Make, tmp_path: Path) -> None:
    now = [0.0]

    def due(step: int, at: float, **policy: int | None) -> bool:
        run = make_run(checkpoint={"everySteps": None, **policy})
        now[0] = 0.0
        store = Store(run.publish.store, retry_seconds=30)
        own = Checkpoints(store, run, Place(0, 0, 1), tmp_path, Progress(enabled=False), clock=lambda: now[0])
        now[0] = at
        return own.due(step)

    assert [due(100, 0), due(99, 1e9), due(200, 0)] == [True, False, True]
    assert [due(100, 119, everyMinutes=2), due(1, 120, everyMinutes=2)] == [False, True]
    both = {"everyMinutes": 2, "everySteps": 7}
    assert [due(7, 0, **both), due(8, 0, **both), due(8, 120, **both)] == [True, False, True]
