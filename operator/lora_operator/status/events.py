"""Events for ``kubectl describe``: one on each change of state, never twice.

The name of an Event is a function of the run, the attempt (or preflight) and the reason. So a second operator, or one
that is restarted, cannot post it again: the API server refuses the name.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from lora_api import API_VERSION, KIND, RULES, ConditionType, LoRAFineTune, LoRAFineTuneStatus, Phase
from lora_api.finetune import ObjectMeta
from lora_operator.children.environment import find_left_out
from lora_operator.names import MANAGER
from lora_operator.state.plan import Plan

_MAX_NOTE = 1024
"""Bytes in UTF-8."""


@dataclass(frozen=True)
class EventSpec:
    """An Event to post. ``about`` is the number of the attempt, or pre and that of the preflight."""

    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str
    about: str


def compute_events(old: LoRAFineTuneStatus, new: LoRAFineTuneStatus) -> list[EventSpec]:
    """What happened between two statuses, in the order in which it happened."""
    events: list[EventSpec] = []
    attempt, about = new.attempt, _about(new)
    if (new.observed_retry or 0) > (old.observed_retry or 0) and old.completion_time is not None:
        events.append(_describe_retry(new, about))
    if new.phase == Phase.PREFLIGHT and old.phase != Phase.PREFLIGHT:
        events.append(EventSpec("Normal", "Preflight", "Check", _message(new, ConditionType.PREFLIGHT_PASSED), about))
    if _holds(new, ConditionType.PREFLIGHT_PASSED) and not _holds(old, ConditionType.PREFLIGHT_PASSED):
        note = _message(new, ConditionType.PREFLIGHT_PASSED)
        events.append(EventSpec("Normal", "PreflightPassed", "Check", note, about))
    if new.attempt > old.attempt:
        made = "Job" if new.phase == Phase.QUEUED else "pods"
        events.append(EventSpec("Normal", "Started", "Launch", f"Attempt {attempt}: created its {made}", about))
    if new.preemptions > old.preemptions:
        note = f"Attempt {attempt}: {_message(new, ConditionType.RUNNING)}"
        events.append(EventSpec("Warning", "Preempted", "Preempt", note, about))
    elif new.phase == Phase.QUEUED and old.phase != Phase.QUEUED:
        note = f"Attempt {attempt}: {_message(new, ConditionType.RUNNING)}"
        events.append(EventSpec("Normal", "Queued", "Queue", note, about))
    if _holds(new, ConditionType.RUNNING) and not _holds(old, ConditionType.RUNNING):
        events.append(EventSpec("Normal", "Running", "Train", f"Attempt {attempt}: every pod runs", about))
    for failure in new.failures:
        if failure not in old.failures and new.phase != Phase.FAILED:
            what = f"Attempt {failure.attempt}" if failure.attempt else "Preflight"
            note = f"{what} failed, and another follows: {failure.message}"
            subject = str(failure.attempt) if failure.attempt else _about(old)
            events.append(EventSpec("Warning", str(failure.failure_class), "Restart", note, subject))
    if new.suspended_attempt > old.suspended_attempt:
        note = f"Attempt {attempt}: runPolicy.suspend ends its pods once they have saved a checkpoint"
        events.append(EventSpec("Normal", "Suspended", "Suspend", note, about))
    if new.reason == "RuntimeNotFound" and old.reason != new.reason:
        events.append(EventSpec("Warning", new.reason, "Wait", _message(new, ConditionType.READY), about))
    obstacle = _obstacle(new)
    if obstacle is not None and _obstacle(old) != obstacle:
        events.append(EventSpec("Warning", obstacle[0], "Wait", obstacle[1], about))
    if new.phase != old.phase and new.phase == Phase.SUCCEEDED:
        kind: Literal["Normal", "Warning"] = "Normal" if _holds(new, ConditionType.PUBLISHED) else "Warning"
        events.append(EventSpec(kind, "Succeeded", "Publish", _message(new, ConditionType.COMPLETE), about))
    if new.phase != old.phase and new.phase == Phase.FAILED:
        events.append(EventSpec("Warning", new.reason or "Failed", "Fail", _describe_end(new), about))
    return events


def describe_left_out(run: LoRAFineTune, plan: Plan) -> list[EventSpec]:
    """What of podTemplate.env the pods that ``plan`` launches do not get: told once a run, as it has one name."""
    names = find_left_out(run) if plan.launch is not None else []
    if not names:
        return []
    note = (
        f"podTemplate.env: {', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: a run may set only the "
        "variables that are listed in docs/reference.md. Any other can be set by podTemplate.env of a "
        "ClusterLoRARuntime, and servers by its endpoints"
    )
    return [EventSpec("Warning", "EnvironmentLeftOut", "Launch", note, "env")]


def _describe_retry(status: LoRAFineTuneStatus, about: str) -> EventSpec:
    """What came of raising runPolicy.retry."""
    subject = f"{about}.r{status.observed_retry}"
    if status.phase == Phase.SUCCEEDED:
        note = f"runPolicy.retry is {status.observed_retry}: the run has succeeded, and is not tried again"
        return EventSpec("Warning", "RetryIgnored", "Retry", note, subject)
    what = f"attempt {status.attempt + 1} goes on from the last checkpoint" if status.attempt else "it begins again"
    note = f"runPolicy.retry was raised to {status.observed_retry}: {what}"
    return EventSpec("Normal", "Retried", "Retry", note, subject)


def _describe_end(status: LoRAFineTuneStatus) -> str:
    """That a run failed, and as what. The status says the rest, once; `kubectl describe` shows it beside this."""
    what = f"Attempt {status.attempt}" if status.attempt else "What comes before the first attempt"
    meaning = f" {RULES[status.failures[-1].failure_class].meaning}" if status.failures else ""
    return f"{what} ended the run.{meaning} The condition Stalled and status.failures say more"


def _about(status: LoRAFineTuneStatus) -> str:
    """What the run is at: an attempt, and how often it lost its quota; or the preflight after those that failed."""
    if not status.attempt:
        again = f".r{status.observed_retry}" if status.retried_attempts is not None else ""
        return f"pre{status.failed_preflights + 1}{again}"
    return f"{status.attempt}.q{status.preemptions}" if status.preemptions else str(status.attempt)


_EXPECTED = frozenset({"Starting", "Restarting", "PodsPending", "PodsRunning", "PodFailed", "Succeeded", "Preflight"})
_OBSTRUCTED = {
    Phase.PREFLIGHT: ConditionType.PREFLIGHT_PASSED,
    Phase.STARTING: ConditionType.RUNNING,
    Phase.RESTARTING: ConditionType.RUNNING,
}
"""The condition that says what keeps pods from starting."""


def _obstacle(status: LoRAFineTuneStatus) -> tuple[str, str] | None:
    """What keeps the pods from starting."""
    kind = _OBSTRUCTED.get(status.phase) if status.phase else None
    failed = {str(failure.failure_class) for failure in status.failures if failure.attempt == status.attempt}
    for item in status.conditions:
        if item.type == kind and item.status == "False" and item.reason not in _EXPECTED | failed:
            return item.reason, item.message
    return None


def _holds(status: LoRAFineTuneStatus, kind: ConditionType) -> bool:
    return any(item.type == kind and item.status == "True" for item in status.conditions)


def _message(status: LoRAFineTuneStatus, kind: ConditionType) -> str:
    return next((item.message for item in status.conditions if item.type == kind), "")


def _one_line(text: str) -> str:
    """``text`` in one line, as `kubectl get events` shows no more, of as many bytes as a note may have."""
    line = " ".join(text.split())
    if len(line.encode()) <= _MAX_NOTE:
        return line
    return line.encode()[: _MAX_NOTE - 3].decode(errors="ignore") + "..."


def build_event(run: ObjectMeta, event: EventSpec, now: datetime, instance: str) -> dict[str, Any]:
    """The Event as a manifest of events.k8s.io/v1."""
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": f"{run.name}.{run.uid[:8]}.{event.about}.{event.reason.lower()}",
            "namespace": run.namespace,
        },
        "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "type": event.type,
        "reason": event.reason,
        "action": event.action,
        "note": _one_line(event.note),
        "reportingController": f"lorafinetune.io/{MANAGER}",
        "reportingInstance": instance[:128],
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": run.name,
            "namespace": run.namespace,
            "uid": run.uid,
        },
    }
