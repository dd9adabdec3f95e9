"""What goes wrong on real nodes, with real pods and the real trainer on a tiny model."""

import json
import time

import pytest

from demo import stack
from lora_api import FailureClass, Phase
from tests.cluster.conftest import Install
from tests.cluster.runs import Runs, find_condition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LONG = {"maxSteps": 120, "learningRate": 0.001, "globalBatchSize": 4}
KILL_ALL = "import os; os.kill(-1, 9)"
"""Kills every process of a pod but its first, which cannot be killed from within, and itself."""


def test_a_training_process_killed_in_the_middle_restarts_the_gang_from_a_checkpoint(runs: Runs) -> None:
    name = runs.submit("killed", training=LONG)
    runs.wait_step(name, 25)
    pod = find_pod(runs, name, attempt=1, index=1)
    runs.kubectl("exec", pod, "--", "/opt/lora/bin/python", "-c", KILL_ALL)

    run = runs.wait_end(name)

    assert run.status.phase == Phase.SUCCEEDED
    assert run.status.attempt == 2
    failure = run.status.failures[0]
    assert (failure.failure_class, failure.pod, failure.rank) == (FailureClass.INTERNAL, pod, 1)
    assert "SIGKILL" in failure.message
    assert failure.log_tail
    assert run.status.charged_restarts == 0, "a newer checkpoint is complete"
    assert run.status.last_checkpoint is not None
    assert run.status.last_checkpoint.step >= 30
    assert_resumed_after(runs, name, step=20)


def test_a_pod_asked_to_stop_saves_a_checkpoint_and_the_gang_restarts_at_no_charge(runs: Runs) -> None:
    name = runs.submit("asked", training=LONG, checkpoint={"everySteps": 1000})
    runs.wait_step(name, 10)
    runs.kubectl("delete", "pod", find_pod(runs, name, attempt=1, index=1), "--wait=false")

    run = runs.wait_end(name)

    assert run.status.phase == Phase.SUCCEEDED
    assert run.status.attempt == 2
    assert [failure.failure_class for failure in run.status.failures] == [FailureClass.CHECKPOINTED]
    assert run.status.charged_restarts == 0
    assert_resumed_after(runs, name, step=10)


def find_pod(runs: Runs, name: str, attempt: int, index: int) -> str:
    names = [pod["metadata"]["name"] for pod in runs.pods(name)]
    return next(pod for pod in names if pod.startswith(f"{name}-{attempt}-{index}-"))


def assert_resumed_after(runs: Runs, name: str, step: int) -> None:
    """The second attempt went on from a checkpoint at ``step`` or later, to the end."""
    lines = runs.progress_lines(find_pod(runs, name, attempt=2, index=0))
    steps = [line.step for line in lines if line.event == "step" and line.step is not None]
    assert steps[0] > step
    assert steps[-1] == LONG["maxSteps"]


def test_a_memory_limit_that_is_too_small_ends_the_run_with_its_remedy(runs: Runs) -> None:
    name = runs.submit("small-limit", podTemplate={"resources": {"limits": {"memory": "256Mi"}}})

    run = runs.wait_end(name)

    assert run.status.phase == Phase.FAILED
    assert run.status.attempt == 1, "an out-of-memory was retried unchanged"
    assert run.status.failures[-1].failure_class == FailureClass.HOST_OUT_OF_MEMORY
    assert "limits.memory" in run.status.failures[-1].remedy
    assert "limits.memory" in find_condition(run, "Stalled").message
    assert "limits.memory" in runs.kubectl("describe", "lft", name)


def test_deleting_a_run_stops_its_pods_within_the_grace_period(runs: Runs) -> None:
    name = runs.submit("deleted", training=LONG)
    runs.wait_step(name, 5)
    start = time.monotonic()

    runs.kubectl("delete", "lft", name)
    while runs.pods(name):
        assert time.monotonic() - start < 120, "pods still run after the grace period"
        time.sleep(0.5)

    for kind in ("jobs", "services"):
        left = json.loads(runs.kubectl("get", kind, f"--selector=lorafinetune.io/name={name}", "--output=json"))
        assert left["items"] == [], kind


def test_a_secret_that_is_missing_is_said_at_once(runs: Runs) -> None:
    name = runs.submit("no-secret", credentials={"secretRef": {"name": "forgotten"}})

    run = runs.wait(name, "a condition names the Secret", lambda run: "forgotten" in str(run.status.conditions), 60)

    assert run.status.phase == Phase.STARTING
    assert find_condition(run, "Running").status == "False"


def test_an_image_that_cannot_be_pulled_is_said_at_once(runs: Runs, install: Install) -> None:
    install(**{"trainer.image.tag": "not-built"})
    try:
        name = runs.submit("no-image")
        run = runs.wait(name, "a condition names the image", lambda run: "not-built" in str(run.status.conditions), 90)
    finally:
        install()

    condition = find_condition(run, "Running")
    assert condition.status == "False"
    assert "trainer.image" in condition.message, "the remedy is missing"
    assert run.status.failures == []


def test_a_run_goes_on_while_its_operator_is_killed_and_started_again(runs: Runs) -> None:
    name = runs.submit("operator-killed", training=LONG)
    runs.wait_step(name, 20)
    pods = [pod["metadata"]["uid"] for pod in runs.pods(name)]
    system = f"--namespace={stack.SYSTEM_NAMESPACE}"

    runs.cluster.kubectl("delete", "pods", system, "--all", "--grace-period=0", "--force")
    run = runs.wait_end(name)

    assert run.status.phase == Phase.SUCCEEDED
    assert run.status.attempt == 1
    assert run.status.failures == []
    assert [pod["metadata"]["uid"] for pod in runs.pods(name)] == pods, "training was started a second time"
