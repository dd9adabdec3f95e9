"""Raising runPolicy.retry on a run that has failed."""

from collections.abc import Callable

import pytest

from lora_operator.settings import Settings
from tests.controlplane.lifecycle.test_policy import set_policy, started
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, settled, termination
from tests.support.wait import eventually


def fail(run: Run, attempt: int = 1) -> None:
    run.set_running(attempt)
    run.set_failed(attempt, "BadData", 65)
    run.wait_phase("Failed")


def conditions(run: Run) -> dict[str, str]:
    return {item["type"]: item["status"] for item in run.status["conditions"]}


def test_a_failed_run_goes_on_with_its_next_attempt_and_may_fail_again(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"retry": 4}))
    fail(run)
    trainer = run.status["trainer"]
    set_policy(run, retry=5)
    run.wait("attempt 2", lambda status: status["attempt"] == 2)
    assert (conditions(run)["Failed"], conditions(run)["Stalled"]) == ("False", "False")
    assert "completionTime" not in run.status
    assert [failure["attempt"] for failure in run.status["failures"]] == [1]
    assert (run.status["trainer"], run.status["observedRetry"]) == (trainer, 5)
    fail(run, 2)
    set_policy(run, retry=6)
    run.set_running(3)
    run.wait_phase("Running")
    run.set_succeeded(3)
    run.wait_phase("Succeeded")
    assert conditions(run)["Ready"] == "True"
    reasons = [event["reason"] for event in run.events()]
    assert (reasons.count("Retried"), reasons.count("BadData")) == (2, 2)


@pytest.mark.parametrize("retry", [0, 1, 2])
def test_a_retry_that_is_not_raised_does_nothing(run: Run, operator: OperatorThread, retry: int) -> None:
    run.create(lambda spec: spec.update(runPolicy={"retry": 2}))
    fail(run)
    set_policy(run, retry=retry, ttlSecondsAfterFinished=1000)
    run.wait("it is seen", lambda status: status["observedGeneration"] == run.raw["metadata"]["generation"])
    assert (run.status["phase"], run.status["attempt"]) == ("Failed", 1)


def test_a_run_that_has_succeeded_says_once_that_it_is_not_tried_again(run: Run, operator: OperatorThread) -> None:
    started(run)
    run.set_succeeded(1)
    run.wait_phase("Succeeded")
    set_policy(run, retry=1)
    eventually("an Event", lambda: [event for event in run.events() if event["reason"] == "RetryIgnored"])
    assert (run.status["phase"], run.status["attempt"]) == ("Succeeded", 1)


def test_what_was_deleted_after_the_end_is_made_again_and_deleted_again(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"ttlSecondsAfterFinished": 0}))
    run.set_running(1)
    run.set_failed(1, "BadData", 65)
    run.wait("cleaned up", lambda status: conditions(run).get("CleanedUp") == "True")
    eventually("no Job", lambda: not run.jobs())
    set_policy(run, retry=1)
    run.set_running(2)
    run.wait_phase("Running")
    assert conditions(run)["CleanedUp"] == "False"
    run.set_failed(2, "BadData", 65)
    run.wait("cleaned up again", lambda status: conditions(run).get("CleanedUp") == "True")


def test_a_suspended_run_waits_until_it_is_let_go(run: Run, operator: OperatorThread) -> None:
    run.create()
    fail(run)
    set_policy(run, suspend=True, retry=1)
    run.wait("suspended", lambda status: status["reason"] == "Suspended")
    assert run.status["attempt"] == 1
    set_policy(run, suspend=False)
    run.wait("attempt 2", lambda status: status["attempt"] == 2)


def test_a_run_that_failed_before_it_began_gets_another_preflight(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, preflight="on")):
        run.create()
        run.set_preflight(1, ended(65, termination("BadData", "record 7 is bad")))
        run.wait_phase("Failed")
    with OperatorThread(fast_settings(namespace, preflight="on", trainer_image="trainer:newer")):
        set_policy(run, retry=1)
        run.set_preflight(2, ended(0, settled(), "Completed"))
        run.wait("attempt 1", lambda status: status["attempt"] == 1)
        assert run.jobs()[-1]["spec"]["template"]["spec"]["containers"][0]["image"] != "trainer:newer"


def test_a_budget_that_was_used_up_starts_anew(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    run.set_running(1)
    run.set_failed(1, "Internal", 70)
    run.wait_phase("Failed")
    set_policy(run, retry=1, maxRestarts=1)
    run.set_running(2)
    run.set_failed(2, "Internal", 70)
    run.set_running(3)
    status = run.wait_phase("Running")
    assert (status["attempt"], status["chargedRestarts"]) == (3, 1)
