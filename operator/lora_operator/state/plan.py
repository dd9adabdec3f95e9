"""What a decision is: a plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_api import AdapterStatus, ConditionType, Failure, Phase, RuntimeSnapshot
from lora_api.preflight import PreflightOutcome
from lora_operator.watched.views import JobView


@dataclass(frozen=True)
class Mark:
    """What a condition is to say."""

    value: bool
    reason: str
    message: str = ""


@dataclass(frozen=True)
class Plan:
    """What to do about a run, and what to say about it.

    ``launch_preflight``, ``launch``, ``restore``, ``delete``, ``stop``, ``clean_up`` and ``delete_run`` are done in
    this order, then the status is written. ``phase`` None: nothing is to be said that is not in the status already.
    ``restore`` is the Job whose other children are to be made again if they are gone, ``suspended`` the attempt that
    runPolicy.suspend ends, ``backoff`` the seconds until a failed attempt may have a successor, ``passed`` what the
    preflight settled, ``micro_batch_size`` what the next attempt is to have, ``runtime`` what the run takes of its
    runtime. ``retry`` takes back the end of a failed run: it is runPolicy.retry; ``afresh``: nothing was made for it.
    ``failing``: a pod has failed, and the others get time for their last words; ``obstructed``: something
    that was to be created was refused, and the run fails if that lasts.
    """

    phase: Phase | None = None
    reason: str = ""
    message: str = ""
    attempt: int = 0
    conditions: Mapping[ConditionType, Mark] = field(default_factory=dict)
    launch_preflight: int | None = None
    launch: int | None = None
    restore: JobView | None = None
    delete: JobView | None = None
    stop: JobView | None = None
    clean_up: bool = False
    delete_run: bool = False
    suspended: int | None = None
    backoff: float = 0.0
    runtime: RuntimeSnapshot | None = None
    failure: Failure | None = None
    charged: bool = False
    micro_batch_size: int | None = None
    adapter: AdapterStatus | None = None
    passed: PreflightOutcome | None = None
    ended: bool = False
    retry: int | None = None
    afresh: bool = False
    failing: bool = False
    obstructed: bool = False
    requeue_after: float | None = None


NOTHING = Plan()

OUTDATED = Plan(requeue_after=0.0)
"""Nothing, but a new decision at once."""
