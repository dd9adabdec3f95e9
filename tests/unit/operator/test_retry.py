"""Raising runPolicy.retry: when the end of a run is taken back, and what it may use up from then on."""

from typing import Any

import pytest

from lora_api import Failure, FailureClass, Phase
from lora_operator.lifecycle.decide import decide
from lora_operator.lifecycle.outcomes import decide_failure
from lora_operator.state.reports import Reports
from lora_operator.status.compute import compute_status
from tests.unit.operator.builders import NOW, a_job, a_run, condition, failure, seen
from tests.unit.operator.cases import SETTINGS

FAILED = {"attempt": 2, "conditions": [condition("Failed")], "failures": [failure(1), failure(2)]}
SUCCEEDED = {"attempt": 2, "conditions": [condition("Complete")]}
CASES: dict[str, tuple[dict[str, Any], int | None, int | None]] = {
    "raised for the first time": (FAILED, 1, 1),
    "raised above what the run had when it failed": ({**FAILED, "observedRetry": 3}, 4, 4),
    "not raised": ({**FAILED, "observedRetry": 3}, 3, None),
    "lowered": ({**FAILED, "observedRetry": 3}, 1, None),
    "taken away": ({**FAILED, "observedRetry": 3}, None, None),
    "0 from the start": (FAILED, 0, None),
    "of a run that has succeeded": (SUCCEEDED, 1, None),
    "of a run that runs": ({"attempt": 1}, 1, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_end_is_taken_back_where_retry_was_raised(case: str) -> None:
    status, retry, want = CASES[case]
    run = a_run(status=status, runPolicy={} if retry is None else {"retry": retry})
    assert decide(seen(run, a_job(2)), NOW, SETTINGS).retry == want


def retried(status: dict[str, Any]) -> Any:
    run = a_run(status=status, runPolicy={"retry": 1})
    new = compute_status(run, decide(seen(run), NOW, SETTINGS), Reports(), NOW)
    return a_run(status=new.to_wire(), runPolicy={"retry": 1})


def test_the_next_attempt_follows() -> None:
    run = retried({**FAILED, "chargedRestarts": 3})
    assert run.status.charged_restarts == 0
    assert decide(seen(run), NOW, SETTINGS).launched_attempt == 3
    assert len(run.status.failures) == 2, "they stay on record"


def test_a_run_that_its_runtime_refused_looks_at_it_again() -> None:
    refused = {"failures": [failure(0, "RuntimeRefused")], "failedPreflights": 1, "runtime": {"name": "h100"}}
    run = retried({**refused, "conditions": [condition("Failed")]})
    assert (run.status.runtime, run.status.failed_preflights) == (None, 0)
    assert not seen(run).has_begun()


def test_a_run_that_has_pods_on_record_keeps_its_runtime() -> None:
    checked = {"failures": [failure(0, "BadData")], "failedPreflights": 1, "runtime": {"name": "h100"}}
    run = retried({**checked, "trainer": {"image": "t:1"}, "conditions": [condition("Failed")]})
    assert (run.status.runtime.name, run.status.failed_preflights) == ("h100", 1)


def a_failure(attempt: int, failure_class: FailureClass = FailureClass.INTERNAL) -> Failure:
    return Failure.model_validate({**failure(attempt, failure_class), "step": 7})


@pytest.mark.parametrize("failure_class", [FailureClass.INTERNAL, FailureClass.EVICTED])
def test_what_was_before_counts_for_nothing(failure_class: FailureClass) -> None:
    """Neither as a failure at the same step, nor as a restart that is not counted."""
    steps = [{**failure(attempt, failure_class), "step": 7} for attempt in range(1, 10)]
    run = retried({"attempt": 9, "conditions": [condition("Failed")], "failures": steps, "chargedRestarts": 0})
    after = a_run(status={**run.status.to_wire(), "attempt": 10}, runPolicy={"retry": 1})
    plan = decide_failure(seen(after), 10, a_failure(10, failure_class), NOW, SETTINGS)
    assert (plan.ended, plan.phase) == (False, Phase.RESTARTING)


def test_the_same_failure_at_the_same_step_ends_it_again_later() -> None:
    steps = [{**failure(attempt), "step": 7} for attempt in (1, 2, 3)]
    run = retried({"attempt": 3, "conditions": [condition("Failed")], "failures": steps})
    later = [*run.status.to_wire()["failures"], *({**failure(attempt), "step": 7} for attempt in (4, 5))]
    after = a_run(status={**run.status.to_wire(), "attempt": 6, "failures": later}, runPolicy={"maxRestarts": 9})
    assert decide_failure(seen(after), 6, a_failure(6), NOW, SETTINGS).ended
