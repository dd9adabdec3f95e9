"""How long a run still waits before its next attempt. Pure."""

from datetime import datetime

from lora_operator.diagnosis.firstseen import retry_seen
from lora_operator.policies.restarts import MAX_BACKOFF
from lora_operator.state.observed import Observed


def seconds_to_retry(observed: Observed, now: datetime) -> float | None:
    """Seconds until status.retryTime; ``None``: there is no need to wait.

    Another operator may have written it, by a clock that was wrong: it is waited for no longer than the longest pause.
    """
    at = observed.run.status.retry_time
    if at is None:
        return None
    waited = (now - observed.reports.seen.get(retry_seen(at), now)).total_seconds()
    left = min((at - now).total_seconds(), MAX_BACKOFF - waited)
    return left if left > 0 else None
