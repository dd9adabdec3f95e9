"""One row of the state machine, how it is checked, and what many rows begin with."""

from dataclasses import dataclass, field, replace
from typing import Any

from lora_api import ConditionType, FailureClass
from lora_operator.lifecycle.decide import decide
from lora_operator.settings import Settings
from lora_operator.state.observed import Observed
from lora_operator.state.plan import (
    DeleteChildren,
    DeleteJob,
    DeleteRun,
    EnqueueJob,
    LaunchAttempt,
    LaunchPreflight,
    Plan,
    StopJob,
)
from lora_operator.state.workload import QueueReport
from tests.unit.operator.builders import (
    NOW,
    a_job,
    a_runtime,
    ago,
    condition,
    ended,
    failure,
    said,
    stamp,
)

SETTINGS = Settings(preflight="off", failure_grace=20.0, start_timeout=600.0)


@dataclass(frozen=True)
class Case:
    """``want``: fields of the plan; a class stands for that of its failure."""

    name: str
    observed: Observed
    want: dict[str, Any] = field(default_factory=dict)
    failure: FailureClass | None = None
    marks: dict[ConditionType, tuple[bool, str]] = field(default_factory=dict)


JOB = a_job()
STARTED = {"attempt": 1}
SUSPENDED = {"suspend": True}
SUSPENDED_ONCE = {"attempt": 1, "suspendedAttempt": 1}
IMPATIENT = {"stallTimeoutSeconds": 60}
LONG_GONE = {"attempt": 1, "conditions": [condition("Failed")], "completionTime": stamp(ago(100))}
CLEANED_UP = {**LONG_GONE, "conditions": [condition("Failed"), condition("CleanedUp")]}
QUEUED = a_job(suspended=True, was_suspended=True)
RESUMED = a_job(was_suspended=True, started=ago(10))
TAKEN_PODS = (
    ended(0, 75, said("Checkpointed"), deleting_at=ago(-100), tracked=False, gone=True),
    ended(1, 70, said("Internal"), deleting_at=ago(-100), tracked=False, gone=True),
)
QUEUE = {"queueName": "team-a"}
WAITS = QueueReport(workload="job-tickets-1-x", queue="team-a", message="no quota for cpu", position=2)
TAKEN = replace(WAITS, evicted="Preempted", evicted_message="Preempted to accommodate another", position=None)
SWITCHED_OFF = replace(TAKEN, evicted="Deactivated", evicted_message="The workload is deactivated")
FAILED_ONCE = {"attempt": 1, "failures": [failure(1)], "chargedRestarts": 1}
NOTHING = {"phase": None, "launch": None, "delete": None, "stop": None, "failure": None, "requeue_after": None}

RUNTIME = a_runtime("h100", generation=3, image="trainer:7", limits={"maxNodes": 2})
REFERENCE = {"runtimeRef": {"name": "h100"}}


_NUMBERED = {"launch": LaunchAttempt, "launch_preflight": LaunchPreflight}
_OF_JOBS = {"delete": DeleteJob, "stop": StopJob, "enqueue": EnqueueJob}
_DONE = {"clean_up": DeleteChildren, "delete_run": DeleteRun}


def value_of(plan: Plan, name: str) -> Any:
    """A field of ``plan``, its failure or its notes; or what it does, in a word: the number, the Job, or whether."""
    if name in _NUMBERED:
        return next((one.number for one in plan.actions if isinstance(one, _NUMBERED[name])), None)
    if name in _OF_JOBS:
        return next((one.job for one in plan.actions if isinstance(one, _OF_JOBS[name])), None)
    if name in _DONE:
        return any(isinstance(one, _DONE[name]) for one in plan.actions)
    return next(getattr(part, name) for part in (plan, plan.failed, plan.notes) if hasattr(part, name))


def check(case: Case, settings: Settings = SETTINGS) -> Plan:
    """Fails where ``decide`` does not say what ``case`` wants; returns what it says."""
    plan = decide(case.observed, NOW, settings)
    assert {name: value_of(plan, name) for name in case.want} == case.want
    assert (plan.failure.failure_class if plan.failure else None) == case.failure
    found = {kind: (mark.value, mark.reason) for kind, mark in plan.conditions.items() if kind in case.marks}
    assert found == case.marks
    return plan
