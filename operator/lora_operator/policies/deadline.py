"""How long the whole gang may run (runPolicy.activeDeadlineSeconds). All pure."""

from datetime import datetime

from lora_api import ConditionType, Failure, FailureClass, LoRAFineTune, LoRAFineTuneStatus
from lora_api.runtime import taken_runtime
from lora_operator.state.failures import new_failure
from lora_operator.wording import format_duration


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
    return new_failure(FailureClass.DEADLINE_EXCEEDED, attempt, message, now)


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
