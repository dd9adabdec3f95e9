"""What to do instead where the API server has refused a call. All pure.

What was to be created is asked for again after a while, and the run fails if the refusal lasts: for minutes where a
policy refuses it, for a day or a week where others have to mend something. Whatever else is refused, by the operator's
role, by a webhook or by a policy, is told in the status and tried again, more and more seldom. It stops nothing but
itself.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.diagnosis.findings import PATIENCE, Obstacle
from lora_operator.diagnosis.obstacles import diagnose_refusal
from lora_operator.lifecycle.outcomes import (
    PREFLIGHT,
    decide_conflict,
    decide_obstructed,
)
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
from lora_operator.state.reports import NO_ANSWER, Denial, RefusedChild
from lora_operator.wording import with_remedy

FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0
"""Seconds until something that is refused is tried again: no event tells when a role, a webhook or a policy changes."""

FORBIDDEN = "OperatorForbidden"
WEBHOOK_FAILED = "WebhookFailed"
CALL_REFUSED = "CallRefused"
_REMEDIES = {
    FORBIDDEN: "Bring the operator's role to its version (helm upgrade).",
    WEBHOOK_FAILED: "See why the webhook that the message names does not answer.",
    CALL_REFUSED: "See the webhook or the policy that the message names: it has to let the operator do that.",
}
FIRST_SILENCE = 2.0
LONGEST_SILENCE = 30.0
"""Seconds until something is created again that was not answered in time."""

_HANGS = (
    "See whether an admission webhook hangs (kubectl get validatingwebhookconfigurations,"
    "mutatingwebhookconfigurations)."
)
_NO_SCHEDULER = "Install the scheduler, or set operator.gangScheduler of the chart to none."
_BY_ITSELF, _RETRY = "The run starts by itself then.", "Then raise runPolicy.retry."
_PASSING = (401, 404, 408, 409, 429)
"""HTTP statuses of calls that come too early or too late, or of an API server that is not well."""


DELETE_JOBS, PATCH_JOBS, DELETE_RUN = "delete jobs", "patch jobs", "delete lorafinetunes"
CHILDREN = ("configmaps", "services", "podgroups", "networkpolicies")
"""What a run may have been made of beside its Jobs."""


def face_refusals(observed: Observed, plan: Plan, now: datetime, settings: RunSettings) -> Plan:
    """``plan``, or what to do instead as long as what it does was refused a moment ago."""
    return _face_denial(observed, _face_refused_child(observed, plan, now, settings), now)


def needs_answer(child: RefusedChild) -> bool:
    """Whether a refusal is one to decide on; another one is an error that passes."""
    if child.conflict or _is_unknown_podgroup(child):
        return True
    return diagnose_refusal(child.kind, child.name, child.status, child.words, child.since) is not None


def is_silence(child: RefusedChild) -> bool:
    """Whether nobody has refused anything: there is no answer yet."""
    return child.status == NO_ANSWER and not child.conflict


def _find_silence(child: RefusedChild) -> Obstacle:
    """The API server takes long to create things in the namespace of a run."""
    message = "The API server takes long to create things in this namespace"
    return _wait_for(child, "NoAnswer", message, _HANGS)


def _find_no_podgroups(child: RefusedChild, settings: RunSettings) -> Obstacle:
    """The gang scheduler that the operator is to work with is not there: nothing starts without it."""
    message = f"The cluster knows no PodGroup of {settings.gang_scheduler}"
    return _wait_for(child, "NoPodGroups", message, _NO_SCHEDULER)


def _wait_for(child: RefusedChild, reason: str, message: str, remedy: str) -> Obstacle:
    return Obstacle(
        reason=reason,
        message=message,
        remedy=f"{remedy} {_BY_ITSELF}",
        since=child.since,
        failure_class=FailureClass.POD_NOT_STARTED,
        limit=PATIENCE,
        final_remedy=f"{remedy} {_RETRY}",
    )


def _is_unknown_podgroup(child: RefusedChild) -> bool:
    return child.kind == "PodGroup" and child.status == 404


def _face_refused_child(observed: Observed, plan: Plan, now: datetime, settings: RunSettings) -> Plan:
    child, launch = observed.reports.refused_child, plan.launch
    if child is None or launch is None or child.is_old(now):
        return plan
    attempt = launch.number if isinstance(launch, LaunchAttempt) else PREFLIGHT
    lasted = (now - child.since).total_seconds()
    if child.conflict:
        passing = child.passing and lasted < PATIENCE
        instead = decide_conflict(observed, attempt, child.words, now, settings, passing=passing)
    else:
        obstacle = _find_obstacle(child, settings)
        if obstacle is None:
            return plan
        instead = decide_obstructed(observed, attempt, obstacle, now, settings)
        if is_silence(child) and instead.failure is None:
            instead = replace(instead, requeue_after=min(LONGEST_SILENCE, max(FIRST_SILENCE, lasted / 4)))
    if instead.failure is not None:
        return instead
    left = (instead.requeue_after or 0.0) - (now - child.at).total_seconds()
    return replace(instead, requeue_after=left) if left > 0 else plan


def _find_obstacle(child: RefusedChild, settings: RunSettings) -> Obstacle | None:
    if _is_unknown_podgroup(child):
        return _find_no_podgroups(child, settings)
    if is_silence(child):
        return _find_silence(child)
    return diagnose_refusal(child.kind, child.name, child.status, child.words, child.since)


def is_refusal(status: int, words: str) -> bool:
    """Whether somebody refuses a call, by its HTTP ``status`` and ``words``. Other errors pass by themselves."""
    return "webhook" in words or (400 <= status < 500 and status not in _PASSING)


def permissions_of(action: Action) -> frozenset[str]:
    """What has to be allowed before ``action`` is worth a try, but for creating things."""
    match action:
        case DeleteJob():
            return frozenset({DELETE_JOBS})
        case DeleteChildren():
            return frozenset({DELETE_JOBS, *(f"delete {kind}" for kind in CHILDREN)})
        case StopJob() | EnqueueJob():
            return frozenset({PATCH_JOBS})
        case DeleteRun():
            return frozenset({DELETE_RUN})
        case _:
            return frozenset()


def _face_denial(observed: Observed, plan: Plan, now: datetime) -> Plan:
    denied = observed.reports.denied
    if not denied or plan.is_verdict:
        return plan
    left = {action: _seconds_to_try(action, denied, now) for action in plan.actions}
    kept = tuple(action for action in plan.actions if left[action] <= 0)
    if any(permissions_of(action) & denied.keys() for action in kept):
        return replace(plan, actions=kept)  # once more
    text = describe_denied(denied)
    if kept == plan.actions:
        return plan if plan.phase is None else replace(plan, message=f"{plan.message.rstrip('.')}. {text}")
    wait = min(seconds for seconds in left.values() if seconds > 0)
    return replace(_tell(observed, plan, text), actions=kept, requeue_after=min(wait, plan.requeue_after or wait))


def _seconds_to_try(action: Action, denied: Mapping[str, Denial], now: datetime) -> float:
    """Seconds until ``action`` is tried again, as far as a part of it was refused."""
    refused = [denied[what] for what in permissions_of(action) if what in denied]
    return max((compute_pause(one) - (now - one.at).total_seconds() for one in refused), default=0.0)


def compute_pause(denial: Denial) -> float:
    """Seconds between what was refused and the next try."""
    return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(denial.times - 1, 30)))


def describe_denied(denied: Mapping[str, Denial]) -> str:
    """What is refused, in the API server's words, and what to do about it."""
    said = [_describe(what, denial) for what, denial in sorted(denied.items())]
    remedies = dict.fromkeys(_REMEDIES[_reason(denial)] for _, denial in sorted(denied.items()))
    text = "; ".join(said)
    return with_remedy(text[0].upper() + text[1:], " ".join(remedies))


def _describe(what: str, denial: Denial) -> str:
    whom = "the operator may not" if _reason(denial) == FORBIDDEN else "the API server does not let the operator"
    return f"{whom} {what}: {denial.words}".rstrip(". ")


def _reason(denial: Denial) -> str:
    if denial.status == 0 or "failed calling webhook" in denial.words:
        return WEBHOOK_FAILED
    judged = "webhook" in denial.words or "denied request" in denial.words
    return FORBIDDEN if denial.status == 403 and not judged else CALL_REFUSED


def _tell(observed: Observed, plan: Plan, text: str) -> Plan:
    """``plan``, which says ``text`` instead of what it did."""
    reason = min(map(_reason, observed.reports.denied.values()), key=list(_REMEDIES).index)
    status, mark = observed.run.status, Mark(value=False, reason=reason, message=text)
    if is_finished(status):
        return replace(plan, conditions={**plan.conditions, ConditionType.CLEANED_UP: mark})
    if plan.phase is not None:
        return replace(plan, message=f"{plan.message.rstrip('.')}. {text}")
    return Plan(
        phase=status.phase or Phase.PENDING,
        reason=reason,
        message=text,
        attempt=status.attempt,
        conditions={ConditionType.RUNNING: mark},
    )
