"""Time, which is given to whatever is pure."""

from datetime import UTC, datetime


def is_due(last: datetime | None, now: datetime, interval: float) -> bool:
    """Whether ``interval`` seconds have passed since ``last``."""
    return last is None or (now - last).total_seconds() >= interval


def utc_now() -> datetime:
    """The time of day, with its zone."""
    return datetime.now(UTC)
