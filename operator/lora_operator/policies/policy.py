"""How often and how long: back-off, repetition, deadline and stall. All pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from lora_api import RULES, ConditionType, Failure, FailureClass, LoRAFineTune, LoRAFineTuneStatus
from lora_api.runtime import taken_runtime
from lora_operator.state.reports import Reports
from lora_operator.wording import format_duration

MAX_BACKOFF = 600.0
"""Longest pause before a restart, in seconds."""

SAME_FAILURES = 3
"""So many failures of one class at one step are no accident."""


def compute_backoff(charged_restarts: int, base: float) -> float:
    """Seconds before the next attempt, after ``charged_restarts`` charged restarts before this one."""
    return float(min(MAX_BACKOFF, base * 2.0 ** min(charged_restarts, 30)))


def is_repetition(earlier: Sequence[Failure], failure: Failure) -> bool:
    """Whether the last attempts all ended with the class of ``failure``, at the same step, so that it is no accident.

    Only of classes that are charged: a node may be taken away at the same step as often as it likes.
    """
    if failure.step is None or not RULES[failure.failure_class].charged:
        return False
    last = [*earlier, failure][-SAME_FAILURES:]
    same = {(one.failure_class, one.step) for one in last}
    return len(last) == SAME_FAILURES and len(same) == 1


def since_retry(status: LoRAFineTuneStatus) -> list[Failure]:
    """The failures since runPolicy.retry was raised: what was before it counts for nothing."""
    last = (status.retried_attempts or 0) - status.failed_preflights
    return [failure for failure in status.failures if failure.attempt > last or not failure.attempt]


OUT_OF_MEMORY = frozenset({FailureClass.GPU_OUT_OF_MEMORY, FailureClass.HOST_OUT_OF_MEMORY})


def find_micro_batch(run: LoRAFineTune, failure: Failure) -> int | None:
    """The micro-batch that ``failure`` happened with, or ``None`` where it was auto and nobody said what it became."""
    status, asked = run.status, run.spec.training.micro_batch_size
    planned = status.plan.micro_batch_size if status.plan else None
    return failure.micro_batch_size or status.micro_batch_size or (planned if asked == "auto" else asked)


def shrink_micro_batch(run: LoRAFineTune, failure: Failure) -> int | None:
    """The micro-batch to try after ``failure``, or ``None``: another one would not help, or is not wanted.

    At most half of what it was, and a divisor of what each process has in one optimizer step, so that globalBatchSize
    stays what it is.
    """
    wanted = run.spec.run_policy.on_out_of_memory == "shrinkMicroBatch"
    if not wanted or failure.failure_class not in OUT_OF_MEMORY or failure.attempt == 0:
        return None
    half = (find_micro_batch(run, failure) or 1) // 2
    share = run.spec.training.global_batch_size // run.spec.parallelism.world_size
    return next((size for size in range(half, 0, -1) if share % size == 0), None)


def running_since(status: LoRAFineTuneStatus) -> datetime | None:
    """Since when the whole gang runs, or ``None`` if it does not."""
    for item in status.conditions:
        if item.type == ConditionType.RUNNING and item.status == "True":
            return item.last_transition_time
    return None


def compute_active_seconds(status: LoRAFineTuneStatus, now: datetime) -> int:
    """Seconds that the whole gang has run until ``now``, over all attempts."""
    since = running_since(status)
    return status.active_seconds + (max(0, round((now - since).total_seconds())) if since else 0)


def find_overrun(run: LoRAFineTune, attempt: int, now: datetime) -> Failure | None:
    """The failure of a run whose deadline has passed, or ``None``."""
    limit = run.spec.run_policy.active_deadline_seconds
    if limit is None or compute_active_seconds(run.status, now) < limit:
        return None
    message = f"The pods have run for {format_duration(compute_active_seconds(run.status, now))}, and "
    message += f"runPolicy.activeDeadlineSeconds is {limit}{_whose_limit(run, limit)}"
    return _failure(FailureClass.DEADLINE_EXCEEDED, attempt, message, now)


def _whose_limit(run: LoRAFineTune, limit: int) -> str:
    """Says so where the deadline is that of the runtime, which a change of the run cannot raise."""
    taken = run.status.runtime
    if taken is None or taken_runtime(run).limits.max_active_deadline_seconds != limit:
        return ""
    return f", the most that ClusterLoRARuntime {taken.name} allows (limits.maxActiveDeadlineSeconds)"


def seconds_to_deadline(run: LoRAFineTune, now: datetime) -> float | None:
    """Seconds of running that are left, or ``None`` without a deadline."""
    limit = run.spec.run_policy.active_deadline_seconds
    return None if limit is None else max(1.0, limit - compute_active_seconds(run.status, now))


def seconds_to_stall(run: LoRAFineTune, reports: Reports, now: datetime) -> float | None:
    """Seconds until a gang that runs counts as stalled; ``None`` while it does not run. Negative: it is stalled.

    They count from the last word of progress that this operator read, or from when the gang began to run.
    """
    since = running_since(run.status)
    if since is None:
        return None
    heard = max(since, reports.heard_at) if reports.heard_at else since
    return (heard + timedelta(seconds=run.spec.run_policy.stall_timeout_seconds) - now).total_seconds()


def find_stall(run: LoRAFineTune, reports: Reports, attempt: int, now: datetime) -> Failure | None:
    """The failure of a gang that has not said a word for too long, or ``None``."""
    left = seconds_to_stall(run, reports, now)
    if left is None or left > 0:
        return None
    progress = reports.progress or run.status.progress
    last = f"the last it said is step {progress.step} of {progress.total_steps}" if progress else "it never said any"
    stage = f" while {reports.stage}" if reports.stage else ""
    message = f"No word of progress for {run.spec.run_policy.stall_timeout_seconds} s{stage}; {last}"
    found = _failure(FailureClass.STALLED, attempt, message, now)
    return found.model_copy(update={"step": progress.step if progress else None})


def _failure(failure_class: FailureClass, attempt: int, message: str, now: datetime) -> Failure:
    return Failure(
        attempt=attempt,
        failure_class=failure_class,
        reason=str(failure_class),
        message=message,
        remedy=RULES[failure_class].remedy,
        at=now,
    )
