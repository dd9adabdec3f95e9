"""What an operator before this one has told of a run stands until this one knows as much. All pure.

What no watch shows, such as logs, Events and queues, is read after the start, and of what is silent it has to be seen
anew for how long. Until then the status has more to say than we have: without this each restart of the operator would
write every such status twice, and take back for a minute what people are to mend.
"""

from dataclasses import replace
from datetime import datetime

from lora_operator.diagnosis.firstseen import job_seen
from lora_operator.diagnosis.silence import QUIET
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan

CATCHING_UP = QUIET + 5.0
"""Seconds from the first look after which this operator knows as much as the one before."""

_SAYS_LITTLE = frozenset({"Starting", "Restarting", "Running", "Preflight"})
"""Reasons that say no more than the phase."""

_QUEUED = "Queued"


def keep_words(observed: Observed, plan: Plan, now: datetime) -> Plan:
    """``plan`` without words, where it would say less than the status does and this operator has just begun to look."""
    status, reports, job = observed.run.status, observed.reports, observed.live_job()
    if job is None or reports.status_written_at is not None or not _says_less(observed, plan):
        return plan
    left = CATCHING_UP - (now - reports.seen.get(job_seen(job), now)).total_seconds()
    if left <= 0 or status.observed_generation != observed.run.metadata.generation:
        return plan
    again = left if plan.requeue_after is None else min(left, plan.requeue_after)
    return replace(plan, phase=None, reason="", message="", conditions={}, requeue_after=again)


def _says_less(observed: Observed, plan: Plan) -> bool:
    """Whether ``plan`` is where the status is, changes nothing, and knows no reason."""
    status = observed.run.status
    if plan.actions or plan.is_verdict or (plan.phase, plan.attempt) != (status.phase, status.attempt):
        return False
    if plan.reason == _QUEUED:
        return observed.reports.queue is None
    return plan.reason in _SAYS_LITTLE and plan.reason != status.reason
