"""How often a run is restarted: what gets further goes on, what does not ends; what others do to it costs nothing."""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from lora_api import RULES, FailureClass, ProgressLine
from lora_operator.manager.app import utc_now
from lora_operator.settings import Settings
from tests.controlplane.lifecycle.test_refusals import ADMISSION
from tests.support.api import Api, ApiError
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, now, termination
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

Make = Callable[..., Settings]


def fail(run: Run, attempt: int, failure_class: str, code: int, message: str = "it broke", **words: Any) -> None:
    """Rank 1 fails, and rank 0 loses its peer."""
    run.set_running(attempt)
    run.set_ended(attempt, 1, code, termination(failure_class, message, rank=1, **words))
    run.set_ended(attempt, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))


def evict(run: Run, attempt: int) -> None:
    target = {
        "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "making room",
        "lastTransitionTime": now(),
    }  # fmt: skip
    for pod in run.gang(attempt):
        run.set_pod(pod, {**ended(143), "conditions": [target]})


def attempt_of(run: Run, attempt: int) -> dict[str, Any]:
    return run.wait(f"attempt {attempt}", lambda status: status.get("attempt", 0) >= attempt)


def test_each_newer_checkpoint_gives_the_restarts_back(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 1}))
    for attempt, saved in enumerate((4, 8, 12), 1):
        fail(run, attempt, "Internal", 70, step=saved + 1, checkpointStep=saved)
        status = attempt_of(run, attempt + 1)
        assert (status["chargedRestarts"], status["lastCheckpoint"]["step"]) == (1, saved)
    fail(run, 4, "Internal", 70, step=14, checkpointStep=12)
    assert run.wait_phase("Failed")["attempt"] == 4
    assert "after 1 of runPolicy.maxRestarts = 1 restarts" in run.condition("Stalled")["message"]


def test_a_checkpoint_that_the_log_tells_of_gives_them_back_at_once(run: Run, settings: Settings) -> None:
    logs: dict[str, str] = {}
    with OperatorThread(settings, logs=logs):
        run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 1}))
        fail(run, 1, "Internal", 70)
        attempt_of(run, 2)
        run.set_running(2)
        run.wait("charged", lambda status: status.get("phase") == "Running" and status["chargedRestarts"] == 1)
        line = ProgressLine(event="step", at=utc_now(), step=5, total_steps=18, loss=1.0, checkpoint_step=4)
        logs["run-2-0-"] = line.to_line() + "\n"
        status = run.wait("given back", lambda status: not status["chargedRestarts"])
        assert (status["phase"], status["lastCheckpoint"]["step"]) == ("Running", 4)
        assert not status.get("recentFailures")


def test_what_others_do_goes_on_for_a_day_without_a_newer_checkpoint(
    run: Run, fast_settings: Make, namespace: str
) -> None:
    ahead = [timedelta()]
    with OperatorThread(fast_settings(namespace, restart_backoff=0.01), clock=lambda: utc_now() + ahead[0]):
        run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0, "stallTimeoutSeconds": 604_800}))
        for attempt in range(1, 7):
            evict(run, attempt)
            status = attempt_of(run, attempt + 1)
        assert (status.get("chargedRestarts", 0), status["recentFailures"]) == (0, 6)
        run.set_running(7)
        run.wait_phase("Running")
        ahead[0] = timedelta(hours=25)
        evict(run, 7)
        status = run.wait_phase("Failed")
    last = status["failures"][-1]
    assert (last["class"], last["remedy"]) == ("NoProgress", RULES[FailureClass.NO_PROGRESS].remedy)
    assert "the last attempt ended as Evicted" in last["message"]


def test_each_eviction_is_followed_by_a_longer_pause(run: Run, fast_settings: Make, namespace: str) -> None:
    with OperatorThread(fast_settings(namespace, restart_backoff=0.5)):
        run.create()
        pauses = []
        for attempt in (1, 2, 3):
            evict(run, attempt)
            status = run.wait("a time", lambda status: status.get("retryTime"))
            pauses.append(status["recentFailures"])
            attempt_of(run, attempt + 1)
        assert pauses == [1, 2, 3]


def test_a_store_that_is_away_costs_no_restart(run: Run, fast_settings: Make, namespace: str) -> None:
    with OperatorThread(fast_settings(namespace, restart_backoff=0.01)):
        run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
        for attempt in range(1, 5):
            fail(run, attempt, "StoreUnavailable", 74, "503 Slow Down")
            status = attempt_of(run, attempt + 1)
        assert not status.get("chargedRestarts")
        assert run.condition("Running")["reason"] != "Failed"


def test_a_key_that_expires_is_waited_for_once_the_run_has_worked(run: Run, operator: OperatorThread) -> None:
    run.create()
    fail(run, 1, "AuthDenied", 67, "403 InvalidAccessKeyId", step=20, checkpointStep=12)
    status = attempt_of(run, 2)
    assert status["failures"][0]["remedy"] == RULES[FailureClass.AUTH_DENIED].waiting_remedy
    assert not status.get("chargedRestarts")


def test_pods_wait_for_a_webhook_that_is_away(run: Run, settings: Settings, api: Api) -> None:
    hooks, name = f"{ADMISSION}/validatingwebhookconfigurations", f"pods-{run.namespace}"
    hook = {
        "name": "pods.example.com",
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": run.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    api.create(hooks, {"metadata": {"name": name}, "webhooks": [hook]})
    try:
        with OperatorThread(settings):
            run.create()
            _stays(run, "WebhookFailed", "pods.example.com", settings)
            api.delete(f"{hooks}/{name}")
            run.gang(1)
            run.set_running(1)
            run.wait_phase("Running")
    finally:
        with suppress(ApiError):
            api.delete(f"{hooks}/{name}")


def test_pods_wait_for_their_priority_class(run: Run, settings: Settings, api: Api) -> None:
    classes, name = "/apis/scheduling.k8s.io/v1/priorityclasses", f"high-{run.namespace}"
    with OperatorThread(settings):
        run.create(lambda spec: spec.update(runPolicy={"priorityClassName": name}))
        _stays(run, "PriorityClassNotFound", name, settings)
        api.create(classes, {"metadata": {"name": name}, "value": 7})
        run.set_running(1)
        run.wait_phase("Running")
    api.delete(f"{classes}/{name}")


def _stays(run: Run, reason: str, words: str, settings: Settings) -> None:
    """The run waits for ``reason`` for longer than anything else that keeps pods from starting."""
    run.wait(reason, lambda _: run.condition("Running").get("reason") == reason)
    message = run.condition("Running")["message"]
    assert words in message
    assert "Remedy: " in message
    begun = utc_now()
    eventually("it lasts", lambda: (utc_now() - begun).total_seconds() > settings.start_timeout + 1)
    assert run.status["phase"] == "Starting"
    assert run.condition("Running")["reason"] == reason
