"""Facts that a status tells and that cannot be derived again. All pure."""

from lora_api import ConditionType, LoRAFineTuneStatus


def is_finished(status: LoRAFineTuneStatus) -> bool:
    """Whether the run has ended for good."""
    return holds(status, ConditionType.COMPLETE) or holds(status, ConditionType.FAILED)


def has_passed(status: LoRAFineTuneStatus) -> bool:
    """Whether a preflight passed."""
    return holds(status, ConditionType.PREFLIGHT_PASSED)


REFUSED_BY_LIMIT_RANGE = "LimitRange"
"""Reason of the failure of a preflight that asked for less than a LimitRange allows."""


def asks_as_the_gang(status: LoRAFineTuneStatus) -> bool:
    """Whether a preflight that asked for less than the gang was refused for it."""
    return any(not failure.attempt and failure.reason == REFUSED_BY_LIMIT_RANGE for failure in status.failures)


def has_started(status: LoRAFineTuneStatus) -> bool:
    """Whether pods were made for the run, as far as its status tells."""
    return bool(status.attempt or status.failed_preflights or has_passed(status))


def holds(status: LoRAFineTuneStatus, kind: ConditionType) -> bool:
    """Whether the condition is true."""
    return any(condition.type == kind and condition.status == "True" for condition in status.conditions)


def is_over(status: LoRAFineTuneStatus, attempt: int) -> bool:
    """Whether ``attempt`` has its verdict: it failed, or was suspended. Another one follows it."""
    return has_failed(status, attempt) or 1 <= attempt <= status.suspended_attempt


def has_failed(status: LoRAFineTuneStatus, attempt: int) -> bool:
    """Whether the failure of ``attempt`` is on record."""
    return any(failure.attempt == attempt for failure in status.failures)
