"""What a decision is: what to do, and what to say about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from lora_api import AdapterStatus, ConditionType, Failure, Phase, RuntimeSnapshot
from lora_api.preflight import PreflightOutcome
from lora_api.status import AvoidedNode
from lora_operator.watched.views import JobView, PodView


@dataclass(frozen=True)
class LaunchPreflight:
    """Creates what preflight ``number`` is made of."""

    number: int


@dataclass(frozen=True)
class LaunchAttempt:
    """Creates what attempt ``number`` is made of."""

    number: int


@dataclass(frozen=True)
class EnqueueJob:
    """Puts ``job`` into the queue of its run: Kueue holds it back, and lets none go that names no queue."""

    job: JobView


@dataclass(frozen=True)
class DeleteJob:
    """Deletes ``job`` and its pods, with their logs."""

    job: JobView


@dataclass(frozen=True)
class StopJob:
    """Ends the pods of ``job`` that still run; it has a failed index, and the others keep their logs."""

    job: JobView


@dataclass(frozen=True)
class DeleteChildren:
    """Deletes all that the run was made of."""


@dataclass(frozen=True)
class DeleteRun:
    """Deletes the run itself, and with it all that belongs to it."""


Action: TypeAlias = LaunchPreflight | LaunchAttempt | EnqueueJob | DeleteJob | StopJob | DeleteChildren | DeleteRun


@dataclass(frozen=True)
class Mark:
    """What a condition is to say."""

    value: bool
    reason: str
    message: str = ""


@dataclass(frozen=True)
class Budget:
    """What a run has used up since its newest complete checkpoint.

    ``charged``: restarts of runPolicy.maxRestarts. ``count``: failures of every kind, which began at ``since``.
    """

    charged: int = 0
    count: int = 0
    since: datetime | None = None


@dataclass(frozen=True)
class FailureRecord:
    """A failure, and what it changes.

    ``charged``: it counts against runPolicy.maxRestarts. ``backoff`` are the seconds until another attempt may follow,
    and ``micro_batch_size`` what that is to have. ``budget`` is what the run has used up, counted from ``checkpoint``;
    the nodes that it avoids from now on are ``avoided``.
    """

    failure: Failure
    charged: bool = False
    backoff: float = 0.0
    budget: Budget | None = None
    checkpoint: int | None = None
    avoided: tuple[AvoidedNode, ...] | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class Notes:
    """What the operator remembers for its next look, and no status holds.

    ``failing``: a pod has failed, and the others get time for their last words. ``short_of_room``: pods hold nodes
    while others find none, and give them back if that lasts. ``words_of``: the pods whose logs are to be read before a
    failure is put on record.
    """

    failing: bool = False
    short_of_room: bool = False
    words_of: tuple[PodView, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to do about a run, and the one change of its status.

    ``actions`` are done in their order, then the status is written. ``phase`` None: nothing is to be said that is not
    in the status already.

    ``suspended`` is the attempt that runPolicy.suspend ends, ``passed`` what the preflight settled, ``runtime`` what
    the run takes of its runtime, ``waiting_since`` when it began to wait for its nodes, or for its Job. ``ended``: the
    run is over. ``retry`` takes back the end of a failed run: it is runPolicy.retry; ``afresh``: nothing was made for
    it.
    """

    actions: tuple[Action, ...] = ()
    phase: Phase | None = None
    reason: str = ""
    message: str = ""
    attempt: int = 0
    conditions: Mapping[ConditionType, Mark] = field(default_factory=dict)
    suspended: int | None = None
    runtime: RuntimeSnapshot | None = None
    failed: FailureRecord | None = None
    adapter: AdapterStatus | None = None
    passed: PreflightOutcome | None = None
    ended: bool = False
    retry: int | None = None
    afresh: bool = False
    waiting_since: datetime | None = None
    notes: Notes = Notes()
    requeue_after: float | None = None

    @property
    def failure(self) -> Failure | None:
        """The failure that is put on record, if one is."""
        return self.failed.failure if self.failed else None

    @property
    def launch(self) -> LaunchAttempt | LaunchPreflight | None:
        """What is launched, if anything is."""
        return next((one for one in self.actions if isinstance(one, LaunchAttempt | LaunchPreflight)), None)

    @property
    def launched_attempt(self) -> int | None:
        """The attempt that is launched, if one is."""
        return next((one.number for one in self.actions if isinstance(one, LaunchAttempt)), None)

    @property
    def is_verdict(self) -> bool:
        """Whether an attempt or a preflight is over with it, so that the next step follows at once."""
        return bool(self.failure or self.passed or self.ended or self.suspended is not None)


NOTHING = Plan()
