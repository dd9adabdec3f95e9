"""When all that an ended run was made of is deleted (runPolicy.ttlSecondsAfterFinished). All pure."""

from datetime import datetime, timedelta

from lora_operator.state.observed import Observed


def seconds_to_cleanup(observed: Observed, now: datetime) -> float | None:
    """Seconds until runPolicy.ttlSecondsAfterFinished has passed; ``None`` without one."""
    ttl, ended_at = observed.run.spec.run_policy.ttl_seconds_after_finished, observed.run.status.completion_time
    if ttl is None or ended_at is None:
        return None
    return (ended_at + timedelta(seconds=ttl) - now).total_seconds()
