"""From a plan to the status that people and machines read. All pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Literal

from lora_api import (
    Condition,
    ConditionType,
    Failure,
    FailureClass,
    LoRAFineTune,
    LoRAFineTuneStatus,
    Phase,
    TrainerPin,
)
from lora_api.status import MAX_FAILURES, STATUS_VERSION, CheckpointStatus
from lora_operator.policies.deadline import compute_active_seconds, running_since
from lora_operator.policies.nodes import keep_recent
from lora_operator.policies.restarts import find_budget, is_newer
from lora_operator.state.facts import holds, is_finished
from lora_operator.state.plan import Budget, Mark, Plan
from lora_operator.state.reports import Reports
from lora_operator.state.upgrades import began_before_endpoints
from lora_operator.status.progress import compute_stopped_progress
from lora_operator.wording import with_remedy

_ORDER = [str(kind) for kind in ConditionType]
_WAITS = (ConditionType.PREFLIGHT_PASSED, ConditionType.SCHEDULED, ConditionType.RUNNING)
"""Conditions whose reason tells what a run waits for."""
_MAX_MESSAGE = 8192


def compute_status(
    run: LoRAFineTune, plan: Plan, reports: Reports, now: datetime, trainer: TrainerPin | None = None
) -> LoRAFineTuneStatus:
    """The status of ``run`` once ``plan`` is done. What another version has written into it stays.

    ``trainer`` is what there is to be on record of it.
    """
    old = run.status
    if plan.retry is not None:
        return _compute_retried(run, plan, now)
    if is_finished(old):
        return _compute_finished(run, plan, now)
    if plan.phase is None:
        return _sign(old, old.model_copy(update={"trainer": trainer or old.trainer}))
    progress = reports.progress or old.progress
    failed = plan.failed
    failures = add_failure(old.failures, failed.failure) if failed else old.failures
    stopped = plan.ended or failed is not None or plan.suspended is not None or plan.phase == Phase.QUEUED
    new = old.model_copy(
        update={
            "observed_generation": run.metadata.generation,
            "phase": plan.phase,
            "reason": plan.reason,
            "attempt": plan.attempt,
            "runtime": plan.runtime or old.runtime,
            "trainer": trainer or old.trainer,
            "listed_keys": None if began_before_endpoints(old) else True,
            "start_time": old.start_time or (now if plan.attempt else None),
            "completion_time": now if plan.ended else None,
            "conditions": compute_conditions(old.conditions, _all_marks(plan), run.metadata.generation, now),
            "progress": compute_stopped_progress(progress, succeeded=plan.phase == Phase.SUCCEEDED)
            if stopped
            else progress,
            "failures": failures,
            "micro_batch_size": (failed.micro_batch_size if failed else None) or old.micro_batch_size,
            "failed_preflights": old.failed_preflights + (1 if failed and failed.failure.attempt == 0 else 0),
            "pins": plan.passed.pins if plan.passed else old.pins,
            "plan": plan.passed.plan if plan.passed else old.plan,
            **_budget(old, plan, reports, now),
            "observed_retry": _observed_retry(run) if plan.ended else old.observed_retry,
            "preemptions": old.preemptions + (1 if _loses_quota(old, plan) else 0),
            "retry_time": _retry_time(old, plan, now),
            "suspended_attempt": plan.suspended or old.suspended_attempt,
            "adapter": plan.adapter or old.adapter,
        }
    )
    new = _count_wait(old, new, plan, now)
    return _sign(old, new if new == old else _count_time(run, new, now))


def add_failure(failures: Sequence[Failure], failure: Failure) -> list[Failure]:
    """The last ``failures`` with one more. A gang may look for room for days: of that only the last time is kept."""
    again = failure.failure_class is FailureClass.NOT_PLACED
    same = bool(failures) and failures[-1].failure_class is FailureClass.NOT_PLACED
    return [*(failures[:-1] if again and same else failures), failure][-MAX_FAILURES:]


def _budget(old: LoRAFineTuneStatus, plan: Plan, reports: Reports, now: datetime) -> dict[str, object]:
    """What is used up of what the run may fail, and the checkpoint since which that counts."""
    failed = plan.failed
    steps = (failed.checkpoint if failed else None, reports.checkpoint_step)
    step = max((step for step in steps if step is not None), default=None)
    budget = (failed.budget if failed else None) or find_budget(old, step)
    if plan.suspended is not None:  # what comes after it is another time
        budget = Budget(budget.charged)
    newer = step is not None and is_newer(old, step)
    avoided = failed.avoided if failed and failed.avoided is not None else old.avoided_nodes or []
    return {
        "last_checkpoint": CheckpointStatus(step=step, at=now) if step is not None and newer else old.last_checkpoint,
        "charged_restarts": budget.charged,
        "recent_failures": budget.count or None,
        "failing_since": budget.since,
        "avoided_nodes": keep_recent(avoided, now) or None,
    }


def _count_wait(old: LoRAFineTuneStatus, new: LoRAFineTuneStatus, plan: Plan, now: datetime) -> LoRAFineTuneStatus:
    """``new``, where the time that this attempt has waited for room or quota does not count as one of failing."""
    placed = holds(new, ConditionType.SCHEDULED) and not holds(old, ConditionType.SCHEDULED)
    if new.failing_since is None or plan.waiting_since is None or not placed:
        return new
    waited = now - min(now, max(plan.waiting_since, new.failing_since))
    return new.model_copy(update={"failing_since": new.failing_since + waited})


def _sign(old: LoRAFineTuneStatus, new: LoRAFineTuneStatus) -> LoRAFineTuneStatus:
    """``new`` with the version of the newest that has written to it, where it is to be written."""
    return new if new == old else new.model_copy(update={"version": max(old.version, STATUS_VERSION)})


def _observed_retry(run: LoRAFineTune) -> int | None:
    """runPolicy.retry as of the end of the run: what was raised before a failure does not try the run again after it.

    It never becomes less, so that lowering it and raising it again does nothing.
    """
    return max(run.status.observed_retry or 0, run.spec.run_policy.retry or 0) or None


def _compute_retried(run: LoRAFineTune, plan: Plan, now: datetime) -> LoRAFineTuneStatus:
    """The status of a run that has failed and goes on. What it may use up starts anew; its failures stay on record."""
    old, generation = run.status, run.metadata.generation
    preflights = 0 if plan.afresh else old.failed_preflights
    new = old.model_copy(
        update={
            "observed_generation": generation,
            "phase": plan.phase,
            "reason": plan.reason,
            "completion_time": None,
            "conditions": compute_conditions(old.conditions, _all_marks(plan), generation, now),
            "runtime": None if plan.afresh else old.runtime,
            "failed_preflights": preflights,
            "charged_restarts": 0,
            "recent_failures": None,
            "failing_since": None,
            "retried_attempts": old.attempt + preflights,
            "observed_retry": plan.retry,
            "retry_time": None,
        }
    )
    return _sign(old, new)


_SEE_STALLED = "the condition Stalled says why"
_FAILED_SHORTLY = f"The run has failed; {_SEE_STALLED}"


def _compute_finished(run: LoRAFineTune, plan: Plan, now: datetime) -> LoRAFineTuneStatus:
    """The status of a run that has ended. It follows the specification, which GitOps waits for, until it is deleted.

    What sums it up is said again each time: an operator that could not read the run may have said something else.
    """
    old, generation = run.status, run.metadata.generation
    if run.metadata.deletion_timestamp:
        return old
    end = _end_of(old)
    whole = end.message
    if whole.endswith(_SEE_STALLED):
        end, whole = replace(end, message=_FAILED_SHORTLY), _find_whole(old)
    marks = _summary(end, whole)
    update: dict[str, object] = {
        "observed_generation": generation,
        "conditions": compute_conditions(old.conditions, {**marks, **plan.conditions}, generation, now),
    }
    if end.phase == Phase.SUCCEEDED:
        update["observed_retry"] = _observed_retry(run)
    if old.phase is None or old.phase.known:
        update |= {"phase": end.phase, "reason": end.reason}
    return _sign(old, old.model_copy(update=update))


def _end_of(status: LoRAFineTuneStatus) -> Plan:
    """What the condition says that ended the run."""
    ends = {ConditionType.COMPLETE: Phase.SUCCEEDED, ConditionType.FAILED: Phase.FAILED}
    phase, end = next((ends[kind], item) for kind in ends for item in status.conditions if _is_true(item, kind))
    return Plan(phase=phase, reason=end.reason, message=end.message)


def _find_whole(status: LoRAFineTuneStatus) -> str:
    """Why the run failed, in full: an older operator may have written less into the condition Stalled."""
    for item in status.conditions:
        if _is_true(item, ConditionType.STALLED) and item.message and not item.message.endswith(_SEE_STALLED):
            return item.message
    return with_remedy(status.failures[-1].message, status.failures[-1].remedy) if status.failures else ""


def _is_true(condition: Condition, kind: ConditionType) -> bool:
    return condition.type == kind and condition.status == "True"


def _loses_quota(old: LoRAFineTuneStatus, plan: Plan) -> bool:
    """Whether an attempt that had left its queue is back in it."""
    left = old.phase in (Phase.STARTING, Phase.RESTARTING, Phase.RUNNING, Phase.PUBLISHING)
    return plan.phase == Phase.QUEUED and left and plan.attempt == old.attempt


def _retry_time(old: LoRAFineTuneStatus, plan: Plan, now: datetime) -> datetime | None:
    """When the next attempt may start; it is of no interest once that has."""
    if plan.failed is not None and plan.failed.backoff and not plan.ended:
        return now + timedelta(seconds=plan.failed.backoff)
    return None if plan.launch is not None or plan.ended or plan.failed is not None else old.retry_time


def _count_time(run: LoRAFineTune, new: LoRAFineTuneStatus, now: datetime) -> LoRAFineTuneStatus:
    """``new`` with the time that the gang has run, once it stops running.

    While it runs, the time goes on by itself: the condition Running says since when.
    """
    if running_since(run.status) is None or running_since(new) is not None:
        return new
    active = compute_active_seconds(run.status, now)
    parallelism = run.spec.parallelism
    return new.model_copy(
        update={"active_seconds": active, "gpu_seconds": active * parallelism.nodes * parallelism.gpus_per_node}
    )


def _all_marks(plan: Plan) -> dict[ConditionType, Mark]:
    """The plan's conditions, and the three of kstatus that sum them up.

    Why a run failed is said once, in Stalled, where tools that know kstatus look for it. The others say where.
    """
    if plan.phase != Phase.FAILED:
        return {**_summary(plan, plan.message), **plan.conditions}
    what = f"Attempt {plan.attempt}" if plan.attempt else "What comes before the first attempt"
    texts = {ConditionType.FAILED: f"{what} ended the run; {_SEE_STALLED}"}
    marks = {
        kind: replace(mark, message=texts.get(kind, f"{what} failed")) if mark.message == plan.message else mark
        for kind, mark in plan.conditions.items()
    }
    return {**_summary(replace(plan, message=_FAILED_SHORTLY), plan.message), **marks}


def _summary(plan: Plan, failure: str) -> dict[ConditionType, Mark]:
    """The conditions of kstatus. ``failure`` is why the run failed, if it did."""
    succeeded, failed = plan.phase == Phase.SUCCEEDED, plan.phase == Phase.FAILED
    under_way = not (succeeded or failed)
    return {
        ConditionType.READY: Mark(succeeded, plan.reason, plan.message),
        ConditionType.RECONCILING: Mark(under_way, plan.reason, plan.message if under_way else ""),
        ConditionType.STALLED: Mark(failed, plan.reason if failed else "AsExpected", failure if failed else ""),
    }


def compute_conditions(
    old: list[Condition], marks: Mapping[ConditionType, Mark], generation: int, now: datetime
) -> list[Condition]:
    """``old`` with ``marks``; the time of a condition changes with its value only."""
    conditions = {condition.type: condition for condition in old}
    for kind, mark in marks.items():
        value: Literal["True", "False"] = "True" if mark.value else "False"
        before = conditions.get(kind)
        since = before.last_transition_time if before and before.status == value else now
        new = Condition(
            type=kind,
            status=value,
            reason=mark.reason,
            message=mark.message[:_MAX_MESSAGE],
            last_transition_time=since,
            observed_generation=generation,
        )
        conditions[kind] = before.model_copy(update=dict(new)) if before and before.model_extra else new
    return sorted(conditions.values(), key=lambda item: _ORDER.index(item.type) if item.type in _ORDER else len(_ORDER))


def compute_invalid_status(run: LoRAFineTuneStatus, generation: int, message: str, now: datetime) -> LoRAFineTuneStatus:
    """The status of a run that has not begun, and does not, since this operator cannot read its specification."""
    marks = {
        ConditionType.READY: Mark(value=False, reason="InvalidSpec", message=message),
        ConditionType.RECONCILING: Mark(value=False, reason="InvalidSpec"),
        ConditionType.STALLED: Mark(value=True, reason="InvalidSpec", message=message),
    }
    new = run.model_copy(
        update={
            "observed_generation": generation,
            "phase": run.phase or Phase.PENDING,
            "reason": "InvalidSpec",
            "conditions": compute_conditions(run.conditions, marks, generation, now),
        }
    )
    return _sign(run, new)


def is_progress_only(old: LoRAFineTuneStatus, new: LoRAFineTuneStatus) -> bool:
    """Whether ``new`` differs from ``old`` only in what changes all the time: numbers and wording, not state."""
    return _state(old) == _state(new)


def _state(status: LoRAFineTuneStatus) -> tuple[object, ...]:
    conditions = tuple(
        (item.type, item.status, item.reason if item.type in _WAITS else "") for item in status.conditions
    )
    last = status.failures[-1].attempt if status.failures else 0
    counts = status.attempt, len(status.failures), last, status.failed_preflights, status.charged_restarts
    return status.phase, *counts, status.adapter, status.runtime is not None, conditions
