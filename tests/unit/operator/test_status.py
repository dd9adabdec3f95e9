"""From a plan to a status and its Events."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from lora_api import ConditionType, Failure, LoRAFineTuneStatus, Phase, Progress, ProgressLine
from lora_api.status import MAX_FAILURES, STATUS_VERSION, AdapterStatus
from lora_operator.lifecycle.decide import decide_success
from lora_operator.state.plan import NOTHING, Budget, FailureRecord, LaunchAttempt, Mark, Plan
from lora_operator.state.reports import Reports
from lora_operator.status.compute import compute_conditions, compute_invalid_status, compute_status, is_progress_only
from lora_operator.status.events import EventSpec, build_event, compute_events
from lora_operator.status.progress import compute_progress
from tests.unit.operator.builders import ADAPTER, NOW, a_run, ago, condition, failure, stamp

RUNNING = Plan(
    phase=Phase.RUNNING,
    reason="Training",
    message="The gang is training",
    attempt=1,
    conditions={ConditionType.RUNNING: Mark(value=True, reason="PodsRunning")},
)

POD_FAILED = {ConditionType.RUNNING: Mark(value=False, reason="PodFailed")}


def a_failure(attempt: int = 1) -> Failure:
    return Failure.model_validate({**failure(attempt), "message": "it broke"})


def values(status: LoRAFineTuneStatus) -> dict[str, str]:
    return {item.type: item.status for item in status.conditions}


def test_nothing_to_say_leaves_the_status_as_it_is() -> None:
    run = a_run(status={"attempt": 1, "phase": "Running"})
    assert compute_status(run, NOTHING, Reports(), NOW) == run.status


@pytest.mark.parametrize(
    ("plan", "want"),
    [
        (RUNNING, {"Ready": "False", "Reconciling": "True", "Stalled": "False"}),
        (
            decide_success(1, AdapterStatus.model_validate(ADAPTER)),
            {"Ready": "True", "Reconciling": "False", "Stalled": "False", "Published": "True", "Complete": "True"},
        ),
        (
            Plan(
                phase=Phase.FAILED,
                reason="BadData",
                message="no",
                attempt=1,
                failed=FailureRecord(a_failure()),
                ended=True,
            ),
            {"Ready": "False", "Reconciling": "False", "Stalled": "True"},
        ),
    ],
    ids=["running", "succeeded", "failed"],
)
def test_kstatus_reads_the_conditions(plan: Plan, want: dict[str, str]) -> None:
    status = compute_status(a_run(metadata={"generation": 7}), plan, Reports(), NOW)
    assert {kind: values(status)[kind] for kind in want} == want
    assert status.observed_generation == 7
    assert {item.observed_generation for item in status.conditions} == {7}


def test_the_status_of_a_run_that_has_ended_follows_its_specification_and_nothing_else() -> None:
    status = ended_status(ConditionType.FAILED)
    old = a_run(status=status).status
    assert compute_status(a_run(status=status), NOTHING, Reports(progress=Progress(step=4)), NOW) == old
    changed = a_run(status=status, metadata={"generation": 2})
    new = compute_status(changed, NOTHING, Reports(), NOW)
    assert (new.observed_generation, new.version) == (2, STATUS_VERSION)
    assert {**new.to_wire(), "conditions": []} == {
        **old.to_wire(), "conditions": [], "observedGeneration": 2, "version": STATUS_VERSION,
    }  # fmt: skip
    assert values(new) == values(old)
    going = a_run(status=status, metadata={"generation": 2, "deletionTimestamp": stamp(NOW)})
    assert compute_status(going, NOTHING, Reports(), NOW) == old


def ended_status(kind: ConditionType) -> dict[str, Any]:
    """The status of a run that has ended as ``kind`` says, as version 1 of the status has it."""
    succeeded = kind == ConditionType.COMPLETE
    ended = {"reason": "Because", "observedGeneration": 1}
    conditions = [
        condition("Ready", str(succeeded)) | ended,
        condition("Reconciling", "False") | ended,
        condition("Stalled", str(not succeeded)) | ended | ({"reason": "AsExpected"} if succeeded else {}),
        condition(str(kind)) | ended,
    ]
    phase = "Succeeded" if succeeded else "Failed"
    return {"attempt": 1, "phase": phase, "reason": "Because", "observedGeneration": 1, "conditions": conditions}


@pytest.mark.parametrize("kind", [ConditionType.COMPLETE, ConditionType.FAILED])
def test_a_run_that_has_ended_heals_of_what_an_operator_said_that_could_not_read_it(kind: ConditionType) -> None:
    healthy = ended_status(kind)
    marked = {"Ready": "False", "Reconciling": "False", "Stalled": "True"}
    spoilt = [
        {**item, "status": marked[item["type"]], "reason": "InvalidSpec", "message": "spec.later: no such field"}
        if item["type"] in marked
        else item
        for item in healthy["conditions"]
    ]
    status = {**healthy, "reason": "InvalidSpec", "conditions": spoilt}
    new = compute_status(a_run(status=status), NOTHING, Reports(), NOW)
    assert values(new) == values(a_run(status=healthy).status)
    assert {item.reason for item in new.conditions} <= {"Because", "AsExpected"}
    assert (new.phase, new.reason, new.attempt) == (healthy["phase"], "Because", 1)


def test_a_phase_of_a_newer_operator_stays_on_a_run_that_has_ended() -> None:
    status = {**ended_status(ConditionType.COMPLETE), "phase": "Archived", "reason": "Cold", "version": 9}
    run = a_run(status=status)
    assert compute_status(run, NOTHING, Reports(), NOW) == run.status


def test_what_a_newer_operator_wrote_outlives_every_status_that_is_computed() -> None:
    later = {"later": {"a": 1}, "version": 9, "trainer": {"image": "t:1", "runVersion": 9, "signature": "s"}}
    progress = {"step": 1, "gpuTemperature": 60}
    running = {**condition("Running", at=ago(30)), "severity": "Info"}
    status = {"attempt": 1, **later, "progress": progress, "conditions": [running, condition("FabricHealthy")]}
    line = ProgressLine(event="step", at=NOW, step=4, total_steps=18, loss=0.5)
    run = a_run(status=status)
    reports = Reports(progress=compute_progress(run.status.progress, [line], logging_steps=1))
    new = compute_status(run, RUNNING, reports, NOW).to_wire()
    assert {name: new[name] for name in later} == later
    assert (new["progress"]["step"], new["progress"]["gpuTemperature"]) == (4, 60)
    kept = {item["type"]: item for item in new["conditions"]}
    assert kept["Running"]["severity"] == "Info"
    assert "FabricHealthy" in kept


def test_a_condition_that_this_operator_does_not_know_stays_and_comes_last() -> None:
    old = a_run(status={"conditions": [condition("Invented"), condition("Ready", "False")]}).status
    new = compute_conditions(old.conditions, {ConditionType.FAILED: Mark(value=True, reason="BadData")}, 1, NOW)
    assert [item.type for item in new] == ["Ready", "Failed", "Invented"]


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        pytest.param(NOTHING, True, id="nothing happens"),
        pytest.param(Plan(phase=Phase.RESTARTING, reason="WaitingForPodsToEnd", message="m"), True, id="it waits on"),
        pytest.param(
            Plan(phase=Phase.RESTARTING, reason="R", message="m", attempt=2, actions=(LaunchAttempt(2),)),
            False,
            id="the next attempt begins",
        ),
        pytest.param(
            Plan(phase=Phase.RESTARTING, reason="R", message="m", failed=FailureRecord(a_failure(2))),
            False,
            id="another failure, without a pause",
        ),
    ],
)
def test_when_the_next_attempt_may_start_is_shown_until_it_does(plan: Plan, left: bool) -> None:
    at = NOW + timedelta(seconds=30)
    run = a_run(status={"attempt": 1, "phase": "Restarting", "retryTime": at.isoformat()})
    assert compute_status(run, plan, Reports(), NOW).retry_time == (at if left else None)


def test_times_are_kept() -> None:
    status = {"attempt": 1, "startTime": stamp(ago(500)), "conditions": [condition("Running", "True", at=ago(400))]}
    new = compute_status(a_run(status=status), RUNNING, Reports(), NOW)
    assert new.start_time == ago(500)
    assert next(item for item in new.conditions if item.type == "Running").last_transition_time == ago(400)
    assert new.completion_time is None


def test_time_is_counted_when_the_gang_stops_and_only_then() -> None:
    status = {"attempt": 2, "activeSeconds": 100, "gpuSeconds": 800, "conditions": [condition("Running", at=ago(30))]}
    run = a_run(status=status, parallelism={"nodes": 2, "gpusPerNode": 4})
    goes_on = compute_status(run, RUNNING, Reports(), NOW)
    assert (goes_on.active_seconds, goes_on.gpu_seconds) == (100, 800)
    stopped = compute_status(run, replace(RUNNING, conditions=POD_FAILED), Reports(), NOW)
    assert (stopped.active_seconds, stopped.gpu_seconds) == (130, 130 * 8)
    later = compute_status(
        run.model_copy(update={"status": stopped}), replace(RUNNING, conditions=POD_FAILED), Reports(), NOW
    )
    assert (later.active_seconds, later.gpu_seconds) == (130, 130 * 8)


def test_the_time_of_a_condition_changes_with_its_value_only() -> None:
    old = LoRAFineTuneStatus.model_validate({"conditions": [condition("Running", "False")]}).conditions
    same = compute_conditions(old, {ConditionType.RUNNING: Mark(value=False, reason="Other")}, 1, NOW)
    other = compute_conditions(old, {ConditionType.RUNNING: Mark(value=True, reason="Other")}, 1, NOW)
    assert (same[0].last_transition_time, same[0].reason) == (ago(50), "Other")
    assert other[0].last_transition_time == NOW


def test_failures_are_counted_and_the_last_ones_kept() -> None:
    status = {"attempt": 12, "chargedRestarts": 2, "failures": [failure(number) for number in range(1, 11)]}
    plan = Plan(
        phase=Phase.RESTARTING, reason="Internal", attempt=12, failed=FailureRecord(a_failure(12), budget=Budget(3, 4))
    )
    new = compute_status(a_run(status=status), plan, Reports(), NOW)
    assert len(new.failures) == MAX_FAILURES
    assert (new.failures[-1].attempt, new.charged_restarts, new.recent_failures) == (12, 3, 4)


def test_progress_survives_an_operator_that_knows_of_none() -> None:
    run = a_run(status={"attempt": 1, "progress": {"step": 9, "eta": "1m20s"}})
    assert compute_status(run, RUNNING, Reports(), NOW).progress == run.status.progress
    failed = Plan(phase=Phase.RESTARTING, reason="x", attempt=1, failed=FailureRecord(a_failure()))
    progress = compute_status(run, failed, Reports(), NOW).progress
    assert progress is not None
    assert (progress.step, progress.eta) == (9, None)


@pytest.mark.parametrize(
    ("change", "only"),
    [
        ({"progress": Progress(step=3)}, True),
        ({"reason": "Checkpointing"}, True),
        ({"phase": Phase.PUBLISHING}, False),
        ({"attempt": 2}, False),
        ({"failures": [a_failure()]}, False),
        ({"conditions": compute_conditions([], POD_FAILED, 1, NOW)}, False),
    ],
)
def test_only_progress_waits(change: dict[str, Any], only: bool) -> None:
    old = compute_status(a_run(), RUNNING, Reports(), NOW)
    assert is_progress_only(old, old.model_copy(update=change)) is only


def test_a_specification_that_cannot_be_read_is_said() -> None:
    status = compute_invalid_status(LoRAFineTuneStatus(attempt=1), 3, "spec.training.color: not permitted", NOW)
    assert values(status) == {"Ready": "False", "Reconciling": "False", "Stalled": "True"}
    assert status.conditions[0].message == "spec.training.color: not permitted"
    assert (status.attempt, status.observed_generation) == (1, 3)


def events_of(old: dict[str, Any], plan: Plan) -> list[tuple[str, str, str]]:
    run = a_run(status=old)
    new = compute_status(run, plan, Reports(), NOW)
    return [(event.type, event.reason, event.about) for event in compute_events(run.status, new)]


STARTED = {"attempt": 1, "phase": "Starting", "conditions": [condition("Running", "False", "Starting")]}
OBSTACLE = Mark(value=False, reason="ImagePullFailed", message="no such image")


@pytest.mark.parametrize(
    ("old", "plan", "want"),
    [
        (
            {},
            Plan(phase=Phase.STARTING, reason="Starting", attempt=1, actions=(LaunchAttempt(1),)),
            [("Normal", "Started", "1")],
        ),
        (STARTED, RUNNING, [("Normal", "Running", "1")]),
        ({**STARTED, "conditions": [condition("Running")]}, RUNNING, []),
        (
            STARTED,
            Plan(phase=Phase.STARTING, reason="x", attempt=1, conditions={ConditionType.RUNNING: OBSTACLE}),
            [("Warning", "ImagePullFailed", "1")],
        ),
        (
            STARTED,
            Plan(phase=Phase.RESTARTING, reason="Internal", attempt=1, failed=FailureRecord(a_failure(), charged=True)),
            [("Warning", "Internal", "1")],
        ),
        (
            STARTED,
            Plan(phase=Phase.FAILED, reason="Internal", attempt=1, failed=FailureRecord(a_failure()), ended=True),
            [("Warning", "Internal", "1")],
        ),
        (STARTED, decide_success(1, AdapterStatus.model_validate(ADAPTER)), [("Normal", "Succeeded", "1")]),
    ],
    ids=["launch", "running", "still running", "obstacle", "restart", "failed", "succeeded"],
)
def test_events(old: dict[str, Any], plan: Plan, want: list[tuple[str, str, str]]) -> None:
    assert events_of(old, plan) == want


def test_an_event_has_a_name_of_its_own() -> None:
    run = a_run()
    new = compute_status(
        run, Plan(phase=Phase.FAILED, reason="BadData", message="x" * 5000, attempt=2, ended=True), Reports(), NOW
    )
    event = build_event(run.metadata, compute_events(run.status, new)[-1], NOW, "host")
    assert event["metadata"] == {"name": "tickets.run-uid.2.baddata", "namespace": "team"}
    assert event["eventTime"] == "2026-11-23T12:00:00.000000Z"
    assert event["regarding"]["uid"] == "run-uid"


@pytest.mark.parametrize(
    ("note", "want"),
    [
        ("one\n  two\r\n\nthree\t four", "one two three four"),
        ("x" * 5000, "x" * 1021 + "..."),
        ("é" * 600, "é" * 510 + "..."),
        ("é" * 512, "é" * 512),
    ],
    ids=["lines", "long", "long in bytes alone", "just short enough"],
)
def test_a_note_is_one_line_of_at_most_1024_bytes(note: str, want: str) -> None:
    """The API server counts bytes, and refuses longer ones; `kubectl get events` shows the first line alone."""
    event = build_event(a_run().metadata, EventSpec("Normal", "Reason", "Act", note, "1"), NOW, "host")
    assert event["note"] == want


FAILED = Plan(
    phase=Phase.FAILED,
    reason="BadData",
    message="record 17 is bad. Remedy: mend it",
    attempt=2,
    failed=FailureRecord(Failure.model_validate({**failure(2, "BadData"), "message": "it broke"})),
    conditions={
        kind: Mark(value=kind == ConditionType.FAILED, reason="BadData", message="record 17 is bad. Remedy: mend it")
        for kind in (ConditionType.RUNNING, ConditionType.FAILED)
    },
    ended=True,
)


def messages(status: LoRAFineTuneStatus) -> dict[str, str]:
    return {str(item.type): item.message for item in status.conditions}


def test_why_a_run_failed_is_said_by_one_condition_alone() -> None:
    """By Stalled, whose message tools take that know kstatus."""
    status = compute_status(a_run(), FAILED, Reports(), NOW)
    assert [kind for kind, text in messages(status).items() if "record 17" in text] == ["Stalled"]
    assert messages(status)["Failed"] == "Attempt 2 ended the run; the condition Stalled says why"
    [event] = [event for event in compute_events(a_run().status, status) if event.reason == "BadData"]
    assert "record 17" not in event.note
    assert event.note.startswith("Attempt 2 ended the run. A record of the dataset is not as its format asks.")


def test_it_stays_so_and_what_an_older_operator_said_shorter_is_put_right() -> None:
    status = compute_status(a_run(), FAILED, Reports(), NOW)
    again = a_run(status=status.to_wire())
    assert compute_status(again, NOTHING, Reports(), NOW) == again.status
    short = messages(status)["Failed"]
    spoilt = [item.model_copy(update={"message": short}) for item in status.conditions]
    older = a_run(status=status.model_copy(update={"conditions": spoilt}).to_wire())
    healed = messages(compute_status(older, NOTHING, Reports(), NOW))
    assert healed["Stalled"] == "it broke."
    assert healed["Ready"] == "The run has failed; the condition Stalled says why"


def test_a_run_that_failed_under_an_older_operator_is_not_written_again() -> None:
    """Thousands of them would be, at each upgrade."""
    whole = {"reason": "BadData", "message": "record 17 is bad", "observedGeneration": 1}
    ended = ended_status(ConditionType.FAILED)
    conditions = [
        item | (whole if item["type"] != "Reconciling" else {"reason": "BadData", "message": ""})
        for item in ended["conditions"]
    ]
    run = a_run(status={**ended, "reason": "BadData", "conditions": conditions})
    assert compute_status(run, NOTHING, Reports(), NOW) == run.status
