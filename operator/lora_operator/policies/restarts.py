"""After which failures another attempt follows, and how soon. All pure."""

from collections.abc import Sequence

from lora_api import RULES, Failure

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
