"""What a diagnosis finds: what is wrong with one pod, or why an attempt does not start."""

from dataclasses import dataclass
from datetime import datetime

from lora_api import Failure, FailureClass
from lora_operator.watched.views import PodView
from lora_operator.wording import with_remedy

PATIENCE = 86_400.0
"""Seconds for which is waited what somebody has to mend, and what is nothing of the run's own."""


@dataclass(frozen=True)
class Symptom:
    """What is wrong with one pod."""

    failure_class: FailureClass
    reason: str
    message: str
    pod: PodView | None = None
    remedy: str = ""
    rank: int | None = None
    step: int | None = None
    micro_batch_size: int | None = None
    at: datetime | None = None
    """By the clock of the node, where the order of ends asks for it; nothing else is to be read into it."""


@dataclass(frozen=True)
class Obstacle:
    """Why an attempt does not start.

    ``failure_class`` is what the run fails with if that lasts; ``None`` waits for ever, as for room. ``permanent``:
    nothing that others do can change it, so there is no waiting. ``limit``: seconds for which it is waited for, if not
    the usual. ``pod``: the one on whose node it is. ``final_remedy`` is what helps after that, if it is not the remedy.
    """

    reason: str
    message: str
    remedy: str
    since: datetime
    failure_class: FailureClass | None = None
    scheduling: bool = False
    permanent: bool = False
    limit: float | None = None
    pod: PodView | None = None
    final_remedy: str = ""

    @property
    def text(self) -> str:
        """For a condition's message."""
        return with_remedy(self.message, self.remedy)

    def seconds_left(self, now: datetime, limit: float) -> float | None:
        """Seconds until the run fails because this has lasted for ``limit`` seconds, or ``None``."""
        if self.failure_class is None:
            return None
        return 0.0 if self.permanent else (self.limit or limit) - (now - self.since).total_seconds()

    def to_failure(self, attempt: int, now: datetime) -> Failure:
        """The failure of ``attempt`` that this became.

        Raises:
            ValueError: it is one that is waited for.
        """
        if self.failure_class is None:
            raise ValueError(f"{self.reason} ends no attempt")
        lasted = "" if self.permanent else f" (for {(now - self.since).total_seconds():.0f} s)"
        return Failure(
            attempt=attempt, failure_class=self.failure_class, reason=self.reason,
            message=f"{self.message}{lasted}", remedy=self.final_remedy or self.remedy, at=now,
            pod=self.pod.name if self.pod else None, node=(self.pod.node or None) if self.pod else None,
        )  # fmt: skip
