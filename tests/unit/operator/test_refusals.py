"""What is done instead where the API server has refused a call."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.lifecycle.refusals import DENIED_SECONDS, face_refusals, needs_answer
from lora_operator.settings import Settings
from lora_operator.state.plan import DeleteJob, DeleteRun, LaunchAttempt, LaunchPreflight, Mark, Plan, StopJob
from lora_operator.state.reports import RefusedChild, Reports, hear_denied, hear_refused_child
from tests.unit.operator.builders import NOW, a_job, a_run, ago, condition, seen, stamp

LAUNCH = Plan(actions=(LaunchAttempt(2),), phase=Phase.RESTARTING, reason="Restarting", attempt=2)
QUOTA = RefusedChild("Job", "tickets-2", 403, "exceeded quota: few", since=ago(5), at=ago(5))
POLICY = replace(QUOTA, words="violates a policy")
TAKEN = replace(QUOTA, status=0, words="Job tickets-2 belongs to something else", conflict=True)


@dataclass(frozen=True)
class Case:
    child: RefusedChild
    reason: str = ""
    after: float | None = None
    failure: FailureClass | None = None
    plan: Plan = LAUNCH


CASES = {
    "what a quota refuses is asked for again": Case(QUOTA, "QuotaExceeded", 25.0),
    "once the time has come it is": Case(replace(QUOTA, at=ago(30)), "Restarting"),
    "a policy is waited for": Case(POLICY, "PodNotStarted", 25.0),
    "but not for ever": Case(replace(POLICY, since=ago(600)), "PodNotStarted", None, FailureClass.POD_NOT_STARTED),
    "a name that is taken ends the run": Case(TAKEN, "NameConflict", None, FailureClass.NAME_CONFLICT),
    "unless what has it is about to go": Case(
        replace(TAKEN, passing=True, at=ago(0.5)), "WaitingForCleanup", 1.5
    ),
    "a scheduler that is not installed is waited for": Case(
        replace(QUOTA, kind="PodGroup", status=404, words="no such kind"), "NoPodGroups", 25.0
    ),
    "it is the preflight's as well": Case(
        replace(TAKEN, name="tickets-pre1"), "NameConflict", None, FailureClass.NAME_CONFLICT,
        replace(LAUNCH, actions=(LaunchPreflight(1),), attempt=0),
    ),
    "a plan that launches nothing is not touched": Case(
        QUOTA, "Suspended", None, plan=Plan(phase=Phase.SUSPENDED, reason="Suspended")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_child_that_is_refused(name: str) -> None:
    case = CASES[name]
    observed = seen(a_run(status={"attempt": 1}), reports=Reports(refused_child=case.child))
    plan = face_refusals(observed, case.plan, NOW, Settings())
    assert (plan.reason, plan.requeue_after) == (case.reason, case.after)
    assert (plan.failure.failure_class if plan.failure else None) == case.failure
    launches = plan.launch is not None
    assert launches == (case.reason == "Restarting"), "nothing is created while a refusal is fresh"


@pytest.mark.parametrize(
    ("child", "answer"),
    [
        (QUOTA, True),
        (TAKEN, True),
        (replace(QUOTA, kind="PodGroup", status=404), True),
        (replace(QUOTA, status=404), False),
        (replace(QUOTA, status=503, words="unavailable"), False),
        (replace(QUOTA, words="namespace is being terminated"), False),
    ],
)
def test_errors_that_pass_are_no_refusals(child: RefusedChild, answer: bool) -> None:
    assert needs_answer(child) is answer


def test_the_time_of_a_refusal_goes_on_while_it_is_of_one_sort() -> None:
    first = hear_refused_child(Reports(), replace(QUOTA, since=ago(100), at=ago(100)))
    again = hear_refused_child(first, replace(QUOTA, words="exceeded quota: used 3", since=NOW, at=NOW))
    assert again.refused_child is not None
    assert (again.refused_child.since, again.refused_child.at) == (ago(100), NOW)
    other = hear_refused_child(again, replace(TAKEN, since=NOW, at=NOW))
    assert other.refused_child is not None
    assert other.refused_child.since == NOW


RUNNING = {"attempt": 1, "phase": "Restarting"}
FINISHED = {"attempt": 1, "phase": "Failed", "conditions": [condition("Failed")], "completionTime": stamp(ago(9))}
DENIALS: dict[str, tuple[dict[str, Any], dict[str, str], float, Plan, tuple[Any, ...], str, ConditionType | None]] = {
    "a Job that may not be deleted is told of": (
        RUNNING, {"delete jobs": "no"}, 1.0, Plan(actions=(DeleteJob(a_job()),)),
        (), "OperatorForbidden", ConditionType.RUNNING,
    ),
    "and tried again": (
        RUNNING, {"delete jobs": "no"}, DENIED_SECONDS, Plan(actions=(DeleteJob(a_job()),)),
        (DeleteJob(a_job()),), "", None,
    ),
    "pods that may not be ended after the end": (
        FINISHED, {"patch jobs": "no"}, 1.0, Plan(actions=(StopJob(a_job()),)), (), "", ConditionType.CLEANED_UP,
    ),
    "a run that may not be deleted": (
        FINISHED, {"delete lorafinetunes": "no"}, 1.0, Plan(actions=(DeleteRun(),)), (), "", ConditionType.CLEANED_UP,
    ),
    "what is not denied is done": (
        RUNNING, {"patch jobs": "no"}, 1.0, LAUNCH, LAUNCH.actions, "Restarting", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENIALS)
def test_what_the_operator_may_not_do_is_told_and_stops_nothing_else(name: str) -> None:
    status, denied, seconds, plan, actions, reason, marked = DENIALS[name]
    reports = Reports(denied=denied, denied_at=ago(seconds))
    faced = face_refusals(seen(a_run(status=status), a_job(), reports=reports), plan, NOW, Settings())
    assert (faced.actions, faced.reason) == (actions, reason)
    if marked is not None:
        mark = faced.conditions[marked]
        assert mark == Mark(value=False, reason="OperatorForbidden", message=mark.message)
        assert f"may not {next(iter(denied))}: no" in mark.message
        assert "Remedy: " in mark.message
        assert faced.requeue_after == DENIED_SECONDS - seconds


def test_what_may_not_be_read_is_said_beside_what_goes_on() -> None:
    reports = Reports(denied={"list events": "no", "get pods/log": "nor this"}, denied_at=ago(500))
    plan = Plan(phase=Phase.STARTING, reason="Starting", message="Waiting for the pods to start")
    faced = face_refusals(seen(a_run(status=RUNNING), reports=reports), plan, NOW, Settings())
    assert faced.reason == "Starting"
    assert faced.message.startswith("Waiting for the pods to start. The operator may not get pods/log: nor this; ")


def test_a_permission_that_is_given_is_forgotten() -> None:
    reports = hear_denied(hear_denied(Reports(), "list events", "no", ago(9)), "get pods/log", "no", ago(8))
    assert hear_denied(reports, "list events", None, NOW).denied == {"get pods/log": "no"}
    assert hear_denied(Reports(), "list events", None, NOW) == Reports(), "nothing changes where nothing was denied"
