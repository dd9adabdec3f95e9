"""How long a gang that runs may be silent (runPolicy.stallTimeoutSeconds). All pure."""

from datetime import datetime, timedelta

from lora_api import Failure, FailureClass, LoRAFineTune
from lora_operator.policies.deadline import running_since
from lora_operator.state.failures import new_failure
from lora_operator.state.reports import Reports


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
    if left is None or left > 0 or not _has_looked(reports, left, now):
        return None
    progress = reports.progress or run.status.progress
    last = f"the last it said is step {progress.step} of {progress.total_steps}" if progress else "it never said any"
    stage = f" while {reports.stage}" if reports.stage else ""
    message = f"No word of progress for {run.spec.run_policy.stall_timeout_seconds} s{stage}; {last}"
    found = new_failure(FailureClass.STALLED, attempt, message, now)
    return found.model_copy(update={"step": progress.step if progress else None})


def _has_looked(reports: Reports, left: float, now: datetime) -> bool:
    """Whether the log was read once more after the gang was due to say something."""
    return reports.log_read_at is not None and reports.log_read_at >= now + timedelta(seconds=left)
