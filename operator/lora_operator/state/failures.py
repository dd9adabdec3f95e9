"""Failures that the operator itself finds. Pure."""

from datetime import datetime

from lora_api import RULES, Failure, FailureClass


def new_failure(failure_class: FailureClass, attempt: int, message: str, now: datetime, reason: str = "") -> Failure:
    """The failure of ``attempt``, with the remedy of its class. ``reason`` is its own name, where it has one."""
    return Failure(
        attempt=attempt,
        failure_class=failure_class,
        reason=reason or str(failure_class),
        message=message,
        remedy=RULES[failure_class].remedy,
        at=now,
    )


def advise(failure: Failure, remedy: str) -> Failure:
    """``failure`` with another ``remedy``, which is cut where it is too long for a status."""
    return Failure.model_validate({**dict(failure), "remedy": remedy})


def reword(failure: Failure, message: str) -> Failure:
    """``failure`` with another ``message``, which is cut where it is too long for a status."""
    return Failure.model_validate({**dict(failure), "message": message})
