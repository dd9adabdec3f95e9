"""What is done instead where the API server has refused a call."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.lifecycle.decide import decide
from lora_operator.lifecycle.refusals import FIRST_PAUSE, compute_pause, face_refusals, is_refusal, needs_answer
from lora_operator.settings import Settings
from lora_operator.state.plan import DeleteJob, DeleteRun, LaunchAttempt, LaunchPreflight, Mark, Plan, StopJob
from lora_operator.state.reports import Denial, RefusedChild, Reports, hear_denied, hear_no_room, hear_refused_child
from tests.unit.operator.builders import NOW, a_job, a_run, ago, condition, ended, failure, running, seen, stamp

LAUNCH = Plan(actions=(LaunchAttempt(2),), phase=Phase.RESTARTING, reason="Restarting", attempt=2)
QUOTA = RefusedChild("Job", "tickets-2", 403, "exceeded quota: few", since=ago(5), at=ago(5))
POLICY = replace(QUOTA, words='admission webhook "jobs.example.com" denied the request: no team')
DAY = 86_400.0
PASSING = replace(QUOTA, words="status unknown for quota: few, resources: count/jobs.batch")
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
    "what nobody has asked for a while is asked before anything is said": Case(
        replace(POLICY, since=ago(9000), at=ago(600)), "Restarting"
    ),
    "what is no denial that is known has a day": Case(replace(PASSING, since=ago(600)), "FailedCreate", 25.0),
    "and no longer": Case(replace(PASSING, since=ago(86_400)), "PodNotStarted", None, FailureClass.POD_NOT_STARTED),
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


LIMITS: dict[str, tuple[RefusedChild, float, str, str, str]] = {
    "a quota that is full": (
        QUOTA, 7 * DAY, "QuotaExceeded", "Wait until the quota has room", "Have the quota raised"
    ),
    "a webhook that is away": (
        replace(QUOTA, status=500, words='failed calling webhook "jobs.example.com": refused'), DAY,
        "WebhookFailed", "See why the webhook", "See why the webhook",
    ),
    "a role of another version": (
        replace(QUOTA, words='User "lora" cannot create resource "jobs"'), DAY,
        "OperatorForbidden", "Bring the operator's role", "Bring the operator's role",
    ),
    "no answer": (
        replace(QUOTA, status=0, words="", at=ago(1)), DAY, "NoAnswer", "See whether an admission", "See whether",
    ),
    "no gang scheduler": (
        replace(QUOTA, kind="PodGroup", status=404, words="no such kind"), DAY,
        "NoPodGroups", "Install the scheduler", "Install the scheduler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("launch", [LaunchAttempt(2), LaunchPreflight(1)])
def test_what_keeps_a_job_from_being_made_is_waited_for_up_to_a_limit(
    name: str, launch: LaunchAttempt | LaunchPreflight
) -> None:
    child, limit, reason, remedy, final = LIMITS[name]
    wanted = replace(LAUNCH, actions=(launch,))
    for lasted, ends in ((limit - 60, False), (limit, True)):
        reports = Reports(refused_child=replace(child, since=ago(lasted)))
        plan = face_refusals(seen(a_run(status={"attempt": 1}), reports=reports), wanted, NOW, Settings())
        assert (plan.phase, plan.ended) == ((Phase.FAILED, True) if ends else (Phase.PENDING, False))
        assert (plan.failure and plan.failure.reason) == (reason if ends else None)
        assert plan.launch is None
        assert f"Remedy: {final if ends else remedy}" in plan.message
        assert ("starts by itself" in plan.message, "raise runPolicy.retry" in plan.message) == (not ends, ends)


def test_what_a_run_that_has_worked_waits_for_ends_too() -> None:
    status = {"attempt": 1, "lastCheckpoint": {"step": 5, "at": stamp(ago(9e5))}}
    for child, limit, reason, _, _ in LIMITS.values():
        reports = Reports(refused_child=replace(child, since=ago(limit)))
        plan = face_refusals(seen(a_run(status=status), reports=reports), LAUNCH, NOW, Settings())
        assert (plan.ended, plan.failure and plan.failure.reason) == (True, reason)


def test_a_name_that_goes_free_is_waited_for_for_a_day() -> None:
    for lasted, want in ((DAY - 1, None), (DAY, FailureClass.NAME_CONFLICT)):
        child = replace(TAKEN, passing=True, since=ago(lasted), at=NOW)
        plan = face_refusals(seen(a_run(), reports=Reports(refused_child=child)), LAUNCH, NOW, Settings())
        assert (plan.failure and plan.failure.failure_class) == want


def test_the_time_of_a_refusal_begins_anew_once_nobody_has_asked_for_a_while() -> None:
    """The run was suspended for a week, say: whatever was refused before that may be allowed by now."""
    for pause, since in ((599, ago(9000)), (600, NOW)):
        old = Reports(refused_child=replace(QUOTA, since=ago(9000), at=ago(pause)))
        again = hear_refused_child(old, replace(QUOTA, since=NOW, at=NOW))
        silent = hear_no_room(old, NOW)
        assert (again.refused_child and again.refused_child.since) == since
        assert (silent.refused_child and silent.refused_child.since) == since


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
    for one in (TAKEN, POLICY, PASSING):
        other = hear_refused_child(again, replace(one, since=NOW, at=NOW))
        assert other.refused_child is not None
        assert other.refused_child.since == NOW


RUNNING = {"attempt": 1, "phase": "Restarting"}
FINISHED = {"attempt": 1, "phase": "Failed", "conditions": [condition("Failed")], "completionTime": stamp(ago(9))}
DENIALS: dict[str, tuple[dict[str, Any], dict[str, str], float, Plan, tuple[Any, ...], str, ConditionType | None]] = {
    "a Job that may not be deleted is told of": (
        RUNNING, {"delete jobs": "no"}, 1.0, Plan(actions=(DeleteJob(a_job()),)),
        (), "OperatorForbidden", ConditionType.RUNNING,
    ),
    "not a moment too early": (
        RUNNING, {"delete jobs": "no"}, FIRST_PAUSE - 0.5, Plan(actions=(DeleteJob(a_job()),)),
        (), "OperatorForbidden", ConditionType.RUNNING,
    ),
    "and tried again": (
        RUNNING, {"delete jobs": "no"}, FIRST_PAUSE, Plan(actions=(DeleteJob(a_job()),)),
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
    reports = Reports(denied={what: Denial(words, ago(seconds)) for what, words in denied.items()})
    faced = face_refusals(seen(a_run(status=status), a_job(), reports=reports), plan, NOW, Settings())
    assert (faced.actions, faced.reason) == (actions, reason)
    if marked is not None:
        mark = faced.conditions[marked]
        assert mark == Mark(value=False, reason="OperatorForbidden", message=mark.message)
        assert f"may not {next(iter(denied))}: no" in mark.message
        assert "Remedy: " in mark.message
        assert faced.requeue_after == FIRST_PAUSE - seconds


def test_what_may_not_be_read_is_said_beside_what_goes_on() -> None:
    reports = Reports(denied={"list events": Denial("no", ago(500)), "get pods/log": Denial("nor this", ago(500))})
    plan = Plan(phase=Phase.STARTING, reason="Starting", message="Waiting for the pods to start")
    faced = face_refusals(seen(a_run(status=RUNNING), reports=reports), plan, NOW, Settings())
    assert faced.reason == "Starting"
    assert faced.message.startswith("Waiting for the pods to start. The operator may not get pods/log: nor this; ")


def test_a_permission_that_is_given_is_forgotten() -> None:
    reports = hear_denied(hear_denied(Reports(), "list events", "no", ago(9)), "get pods/log", "no", ago(8))
    assert hear_denied(reports, "list events", None, NOW).denied == {"get pods/log": Denial("no", ago(8))}
    assert hear_denied(Reports(), "list events", None, NOW) == Reports(), "nothing changes where nothing was denied"


HOOK = 'admission webhook "keep" denied the request: no deletes at night'
AWAY = 'Internal error occurred: failed calling webhook "jobs.example.org": context deadline exceeded'
VAP = "jobs.batch \"r-1\" is forbidden: ValidatingAdmissionPolicy 'night' with binding 'b' denied request: not now"
ROLE = 'jobs.batch "r-1" is forbidden: User "lora" cannot delete resource "jobs"'


@pytest.mark.parametrize(
    ("status", "words", "refused", "reason", "remedy"),
    [
        (403, ROLE, True, "OperatorForbidden", "helm upgrade"),
        (403, HOOK, True, "CallRefused", "webhook or the policy"),
        (400, HOOK, True, "CallRefused", "webhook or the policy"),
        (409, HOOK, True, "CallRefused", "webhook or the policy"),
        (422, VAP, True, "CallRefused", "webhook or the policy"),
        (403, VAP, True, "CallRefused", "webhook or the policy"),
        (500, AWAY, True, "WebhookFailed", "does not answer"),
        (500, "etcdserver: leader changed", False, "", ""),
        (503, "unavailable", False, "", ""),
        (409, "the object has been modified", False, "", ""),
        (0, "no answer", False, "", ""),
    ],
)
def test_a_refused_call_is_told_with_the_remedy_of_whoever_refuses(
    status: int, words: str, refused: bool, reason: str, remedy: str
) -> None:
    assert is_refusal(status, words) is refused
    if not refused:
        return
    reports = hear_denied(Reports(), "delete jobs", words, ago(1), status)
    observed = seen(a_run(status=RUNNING), a_job(), reports=reports)
    faced = face_refusals(observed, Plan(actions=(DeleteJob(a_job()),)), NOW, Settings())
    assert (faced.actions, faced.reason) == ((), reason)
    assert words in faced.message
    assert remedy in faced.message.partition("Remedy: ")[2]


def test_what_is_refused_is_tried_again_more_and_more_seldom() -> None:
    reports = Reports()
    pauses = list[float]()
    for _ in range(9):
        reports = hear_denied(reports, "delete jobs", "no", NOW)
        pauses.append(compute_pause(reports.denied["delete jobs"]))
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_an_action_that_was_refused_holds_up_no_other() -> None:
    reports = hear_denied(Reports(), "delete jobs", HOOK, ago(1), 400)
    plan = replace(LAUNCH, actions=(*LAUNCH.actions, DeleteJob(a_job())))
    faced = face_refusals(seen(a_run(status=RUNNING), reports=reports), plan, NOW, Settings())
    assert faced.actions == LAUNCH.actions
    assert HOOK in faced.message
    assert faced.requeue_after == FIRST_PAUSE - 1


def test_a_job_that_may_not_be_deleted_holds_up_no_attempt_once_its_pods_have_ended() -> None:
    run = a_run(status={"attempt": 1, "phase": "Restarting", "failures": [failure()]})
    denied = hear_denied(Reports(run_uid="run-uid"), "delete jobs", HOOK, ago(1), 400)
    ended_gang = (a_job(), ended(0), ended(1))
    assert decide(seen(run, *ended_gang), NOW, Settings()).actions == (DeleteJob(a_job()),)
    assert decide(seen(run, *ended_gang, reports=denied), NOW, Settings()).launched_attempt == 2
    for pods in ([ended(0), running(1)], [ended(0)]):
        plan = decide(seen(run, a_job(), *pods, reports=denied), NOW, Settings())
        assert plan.actions == (DeleteJob(a_job()),), "it holds nodes, or is about to"


def test_a_job_that_was_left_is_deleted_beside_the_next_attempt() -> None:
    run = a_run(status={"attempt": 2, "phase": "Restarting", "failures": [failure()]})
    plan = decide(seen(run, a_job(1), ended(0), ended(1), a_job(2), running(0, 2), running(1, 2)), NOW, Settings())
    assert plan.actions == (DeleteJob(a_job(1)),)
    assert plan.phase == Phase.RUNNING


@pytest.mark.parametrize(("lasted", "at", "after"), [(0.5, 0.5, 1.5), (40, 1, 9.0), (4000, 1, 29.0), (4000, 31, None)])
def test_what_is_not_answered_is_asked_for_again_more_and_more_seldom(
    lasted: float, at: float, after: float | None
) -> None:
    silence = RefusedChild("Job", "", 0, "", since=ago(lasted), at=ago(min(lasted, at + 30)))
    reports = hear_no_room(Reports(refused_child=silence), ago(at))
    plan = face_refusals(seen(a_run(status={"attempt": 1}), reports=reports), LAUNCH, NOW, Settings())
    assert (plan.reason, plan.requeue_after) == (("NoAnswer", after) if after else ("Restarting", None))
    assert (plan.launch is None) == bool(after)


def test_what_was_said_before_stays_known_while_there_is_no_room() -> None:
    reports = hear_no_room(hear_refused_child(Reports(), QUOTA), NOW)
    assert reports.refused_child == replace(QUOTA, at=NOW)
