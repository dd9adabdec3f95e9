"""What to do instead where the API server has refused a call. All pure.

What was to be created is asked for again after a while, and the run fails if the refusal lasts. Whatever else the
operator may not do is told in the status, and stops nothing but itself.
"""

from dataclasses import replace
from datetime import datetime

from lora_api import ConditionType, Phase
from lora_operator.diagnosis.obstacles import diagnose_refusal
from lora_operator.lifecycle.outcomes import PREFLIGHT, decide_conflict, decide_no_podgroups, decide_obstructed
from lora_operator.settings import RunSettings
from lora_operator.state.facts import is_finished
from lora_operator.state.observed import Observed
from lora_operator.state.plan import (
    Action,
    DeleteChildren,
    DeleteJob,
    DeleteRun,
    EnqueueJob,
    LaunchAttempt,
    Mark,
    Plan,
    StopJob,
)
from lora_operator.state.reports import RefusedChild
from lora_operator.wording import with_remedy

DENIED_SECONDS = 30.0
"""Until something that the operator may not do is tried again: no event tells when its role changes."""

FORBIDDEN = "OperatorForbidden"
_ROLE_REMEDY = "Bring the operator's role to its version (helm upgrade)."


def face_refusals(observed: Observed, plan: Plan, now: datetime, settings: RunSettings) -> Plan:
    """``plan``, or what to do instead as long as what it does was refused a moment ago."""
    return _face_denial(observed, _face_refused_child(observed, plan, now, settings), now)


def needs_answer(child: RefusedChild) -> bool:
    """Whether a refusal is one to decide on; another one is an error that passes."""
    if child.conflict or _is_unknown_podgroup(child):
        return True
    return diagnose_refusal(child.kind, child.name, child.status, child.words, child.since) is not None


def _is_unknown_podgroup(child: RefusedChild) -> bool:
    return child.kind == "PodGroup" and child.status == 404


def _face_refused_child(observed: Observed, plan: Plan, now: datetime, settings: RunSettings) -> Plan:
    child, launch = observed.reports.refused_child, plan.launch
    if child is None or launch is None:
        return plan
    attempt = launch.number if isinstance(launch, LaunchAttempt) else PREFLIGHT
    if _is_unknown_podgroup(child):
        instead = decide_no_podgroups(observed, settings)
    elif child.conflict:
        instead = decide_conflict(observed, attempt, child.words, now, settings, passing=child.passing)
    else:
        obstacle = diagnose_refusal(child.kind, child.name, child.status, child.words, child.since)
        if obstacle is None:
            return plan
        instead = decide_obstructed(observed, attempt, obstacle, now, settings)
    if instead.failure is not None:
        return instead
    left = (instead.requeue_after or 0.0) - (now - child.at).total_seconds()
    return replace(instead, requeue_after=left) if left > 0 else plan


def permission_of(action: Action) -> str:
    """What the operator's role has to allow for ``action``, but for creating things."""
    match action:
        case DeleteJob() | DeleteChildren():
            return "delete jobs"
        case StopJob() | EnqueueJob():
            return "patch jobs"
        case DeleteRun():
            return "delete lorafinetunes"
        case _:
            return ""


def _face_denial(observed: Observed, plan: Plan, now: datetime) -> Plan:
    reports = observed.reports
    if not reports.denied or reports.denied_at is None or plan.is_verdict:
        return plan
    kept = tuple(action for action in plan.actions if permission_of(action) not in reports.denied)
    left = DENIED_SECONDS - (now - reports.denied_at).total_seconds()
    if kept != plan.actions and left <= 0:
        return plan  # once more
    text = "; ".join(f"the operator may not {what}: {answer}" for what, answer in sorted(reports.denied.items()))
    text = with_remedy(text[0].upper() + text[1:], _ROLE_REMEDY)
    if kept == plan.actions:
        return plan if plan.phase is None else replace(plan, message=f"{plan.message.rstrip('.')}. {text}")
    wait = min(left, plan.requeue_after or left)
    return replace(_tell(observed, plan, text), actions=kept, requeue_after=wait)


def _tell(observed: Observed, plan: Plan, text: str) -> Plan:
    """``plan``, which says ``text`` instead of what it did."""
    status, mark = observed.run.status, Mark(value=False, reason=FORBIDDEN, message=text)
    if is_finished(status):
        return replace(plan, conditions={**plan.conditions, ConditionType.CLEANED_UP: mark})
    if plan.phase is not None:
        return replace(plan, message=f"{plan.message.rstrip('.')}. {text}")
    return Plan(
        phase=status.phase or Phase.PENDING,
        reason=FORBIDDEN,
        message=text,
        attempt=status.attempt,
        conditions={ConditionType.RUNNING: mark},
    )
