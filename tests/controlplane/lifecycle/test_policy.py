"""Suspend and resume, pauses, deadline, stall and clearing up, on a real API server and Job controller."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from lora_operator.clock import utc_now
from lora_operator.objects import parse_time
from lora_operator.settings import Settings
from tests.support.api import Api, ApiError, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, now
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane


def set_policy(run: Run, **policy: Any) -> None:
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": policy}})


def started(run: Run, **policy: Any) -> None:
    """A gang that runs."""
    run.create(lambda spec: spec.update(runPolicy=policy))
    run.set_running(1)
    run.wait_phase("Running")


def line(step: int) -> str:
    """A progress line of now."""
    return json.dumps({"lora": {"event": "step", "at": now(), "step": step, "totalSteps": 1800, "loss": 1.0}}) + "\n"


def test_suspend_frees_the_pods_and_resume_goes_on(run: Run, operator: OperatorThread) -> None:
    started(run)
    set_policy(run, suspend=True)
    run.wait("suspended", lambda status: status["reason"] == "Suspended")
    assert (run.jobs(), run.pods(1)) == ([], [])
    assert run.condition("Running")["reason"] == "Suspended"
    set_policy(run, suspend=False)
    run.set_running(2)
    status = run.wait_phase("Running")
    assert (status["attempt"], status.get("failures", []), status.get("chargedRestarts", 0)) == (2, [], 0)
    run.set_succeeded(2)
    run.wait_phase("Succeeded")
    reasons = ["Started", "Running", "Suspended", "Started", "Running", "Succeeded"]
    eventually("Events", lambda: [event["reason"] for event in run.events()] == reasons)


def test_a_run_that_is_created_suspended_makes_nothing(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"suspend": True}))
    status = run.wait_phase("Suspended")
    assert (status["attempt"], run.jobs(), run.services()) == (0, [], [])
    set_policy(run, suspend=False)
    assert run.wait_phase("Starting")["attempt"] == 1
    run.gang(1)


def test_a_suspension_outlives_the_operator_cut_after_any_call(
    api: Api, make_namespace: Callable[[], str], fast_settings: Callable[..., Settings]
) -> None:
    def suspend_with_cut(k: int | None) -> int:
        namespace = make_namespace()
        run, settings = Run(api, namespace), fast_settings(namespace, log_interval=60.0, progress_interval=60.0)
        with OperatorThread(settings):
            started(run)
        set_policy(run, suspend=True)
        first = OperatorThread(settings, cut_after=k).start()
        try:
            eventually("the cut or the end", lambda: first.is_cut or run.status.get("reason") == "Suspended", 60)
        finally:
            first.stop()
        with OperatorThread(settings):
            run.wait("suspended", lambda status: status["reason"] == "Suspended", 60)
            assert (run.jobs(), run.pods(1)) == ([], [])
            set_policy(run, suspend=False)
            run.gang(2)
        assert (run.status["attempt"], run.status.get("failures", [])) == (2, [])
        return len(first.calls)

    calls = suspend_with_cut(None)
    assert 6 <= calls <= 12, calls
    for k in range(1, calls + 1):
        suspend_with_cut(k)


def test_a_charged_restart_comes_after_a_pause(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, restart_backoff=2.0)):
        started(run)
        run.set_failed(1, "Internal", 70)
        status = run.wait("a time", lambda status: status.get("retryTime"))
        assert (status["phase"], status["attempt"]) == ("Restarting", 1)
        status = run.wait("attempt 2", lambda status: status["attempt"] == 2)
        assert "retryTime" not in status


def test_the_deadline_ends_the_run_and_its_pods(run: Run, operator: OperatorThread) -> None:
    started(run)
    set_policy(run, activeDeadlineSeconds=1)
    status = run.wait_phase("Failed")
    assert status["failures"][0]["class"] == "DeadlineExceeded"
    assert "runPolicy.activeDeadlineSeconds is 1" in run.condition("Stalled")["message"]
    assert status["activeSeconds"] >= 1
    eventually("no pods", lambda: run.pods(1) == [])


class Talk(dict[str, str]):
    """A log that has a new line at every look."""

    looks = 0

    def items(self) -> Any:
        self.looks += 1
        return {"run-1-0-": line(self.looks)}.items()


@pytest.mark.parametrize("log_interval", [0.2, 60.0])
def test_a_gang_that_talks_is_not_stalled_however_seldom_it_is_listened_to(
    run: Run, fast_settings: Callable[..., Settings], namespace: str, log_interval: float
) -> None:
    with OperatorThread(fast_settings(namespace, log_interval=log_interval), logs=Talk()):
        started(run, stallTimeoutSeconds=10)
        since = parse_time(run.condition("Running")["lastTransitionTime"])
        assert since is not None

        def seconds(status: Raw) -> float:
            at = parse_time((status.get("progress") or {}).get("at"))
            return (at - since).total_seconds() if at else 0.0

        status = run.wait("more than the timeout", lambda status: seconds(status) > 12, 60)
        assert (status["phase"], status["attempt"], status.get("failures", [])) == ("Running", 1, [])


def test_an_operator_that_stood_still_as_it_listened_calls_nobody_stalled(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    logs = Talk()
    clock = lambda: utc_now() + timedelta(seconds=20 * logs.looks)  # noqa: E731
    with OperatorThread(fast_settings(namespace), logs=logs, clock=clock):
        started(run, stallTimeoutSeconds=10)
        status = run.wait("progress", lambda status: (status.get("progress") or {}).get("step", 0) >= 5)
        assert (status["phase"], status["attempt"], status.get("failures", [])) == ("Running", 1, [])


def test_a_gang_that_says_nothing_more_is_restarted_with_its_last_words(run: Run, operator: OperatorThread) -> None:
    operator.logs["run-1-0-"] = line(4)
    operator.logs["run-1-1-"] = "waiting for the others\n"
    started(run, stallTimeoutSeconds=10)
    run.wait("progress", lambda status: (status.get("progress") or {}).get("step") == 4)
    status = run.wait("attempt 2", lambda status: status["attempt"] == 2, 60)
    failure = status["failures"][0]
    assert (failure["class"], failure["step"], status["chargedRestarts"]) == ("Stalled", 4, 1)
    assert "the last it said is step 4 of 1800" in failure["message"]
    assert "waiting for the others" in failure["logTail"]
    assert "[step 4 of 1800, loss" in failure["logTail"], "in words"


def test_children_are_deleted_after_a_while_and_the_run_stays_ended(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace)):
        started(run)
        run.set_failed(1, "Internal", 70)
        run.set_running(2)
        run.set_failed(2, "BadData", 65)
        before = run.wait_phase("Failed")
        configmaps = f"/api/v1/namespaces/{namespace}/configmaps"
        foreign = {"metadata": {"name": "run-1", "labels": {"lorafinetune.io/name": "run"}}, "data": {"a": "b"}}
        run.api.create(configmaps, foreign)
        leave_what_an_earlier_release_made(run)
        set_policy(run, ttlSecondsAfterFinished=0)
        for look in (run.jobs, run.services, run.policies):
            eventually(f"no {look.__name__}", lambda look=look: look() == [])
        eventually("no pods", lambda: run.pods(2) == [])
        (left,) = run.configmaps()
        assert (left["metadata"]["name"], left["data"]) == ("run-1", {"a": "b"}), "what is not the run's stays"
        after = run.wait("CleanedUp", lambda status: run.condition("CleanedUp").get("status") == "True")
    assert after.pop("observedGeneration") == before.pop("observedGeneration") + 1
    assert [item["type"] for item in after.pop("conditions")] == [
        *(item["type"] for item in before.pop("conditions")), "CleanedUp"
    ]  # fmt: skip
    assert after == before


def leave_what_an_earlier_release_made(run: Run) -> None:
    """A ConfigMap for each Job, and a Service for each attempt."""
    core, owners = f"/api/v1/namespaces/{run.namespace}", run.jobs()[0]["metadata"]["ownerReferences"]
    metadata = {"name": "run-2", "labels": {"lorafinetune.io/name": "run"}, "ownerReferences": owners}
    run.api.create(f"{core}/configmaps", {"metadata": metadata, "data": {"run.json": "{}"}})
    run.api.create(f"{core}/services", {"metadata": metadata, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}})


def test_what_is_left_of_a_job_that_ended_with_its_run_is_cleared_up_too(run: Run, operator: OperatorThread) -> None:
    policy = {"activeDeadlineSeconds": 1, "ttlSecondsAfterFinished": 1}
    run.create(lambda spec: spec.update(runPolicy=policy)).set_running(1)
    assert run.wait_phase("Failed")["reason"] == "DeadlineExceeded"
    eventually("no Job", lambda: run.jobs() == [])
    eventually("nothing else", lambda: (run.services(), run.policies()) == ([], []))
    message = run.wait("CleanedUp", lambda status: run.condition("CleanedUp")) and run.condition("CleanedUp")["message"]
    assert message.startswith("ttlSecondsAfterFinished (1 s) is over")


def test_gitops_sees_that_a_change_after_the_end_has_been_read(run: Run, operator: OperatorThread) -> None:
    """By kstatus, a resource whose observedGeneration is old is still under way."""
    started(run)
    run.set_failed(1, "BadData", 65)
    before = run.wait_phase("Failed")
    set_policy(run, ttlSecondsAfterFinished=3600)
    after = run.wait("it", lambda status: status["observedGeneration"] == run.raw["metadata"]["generation"])
    generation = before["observedGeneration"] + 1
    summed_up = ("Ready", "Reconciling", "Stalled")
    conditions = [
        {**item, "observedGeneration": generation} if item["type"] in summed_up else item
        for item in before["conditions"]
    ]
    assert after == {**before, "observedGeneration": generation, "conditions": conditions}


def test_the_run_goes_too_where_that_is_asked_for(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"ttlSecondsAfterFinished": 1, "ttlDeletes": "run"}))
    run.set_running(1)
    run.set_failed(1, "BadData", 65)

    def gone() -> bool:
        try:
            return not run.raw
        except ApiError as error:
            return error.status == 404

    eventually("no run", gone)
    eventually("no Jobs", lambda: run.jobs() == [], 90)  # the garbage collector hears of a new CRD within 30 s


def test_a_gang_without_memory_is_restarted_with_less_at_once(run: Run, operator: OperatorThread) -> None:
    started(run, onOutOfMemory="shrinkMicroBatch", maxRestarts=0)
    for attempt, size in ((1, 4), (2, 2), (3, 1)):
        training = run.document(attempt)["training"]
        assert (training["microBatchSize"], training["globalBatchSize"]) == (size, 8)
        run.set_running(attempt)
        run.set_failed(attempt, "GPUOutOfMemory", 71, "CUDA out of memory")
        if size > 1:
            run.wait(f"attempt {attempt + 1}", lambda status, attempt=attempt: status["attempt"] == attempt + 1)
    status = run.wait_phase("Failed")
    assert (status["reason"], status["microBatchSize"], status["chargedRestarts"]) == ("GPUOutOfMemory", 1, 0)
    assert [failure["class"] for failure in status["failures"]] == ["GPUOutOfMemory"] * 3
