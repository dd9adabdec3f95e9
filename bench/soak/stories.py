"""What happens to each run of the soak, and the one state in which it has to end. Pure: a seed gives the stories.

A story says how each preflight and attempt ends. What else befalls the cluster (faults.py) may make a run slower, and
changes nothing about its end, which ``compute_outcome`` tells by the failure table alone.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_api import RULES, FailureClass, Phase
from lora_api.finetune import RunPolicy

MICRO_BATCH = 4
"""training.microBatchSize of every run. Each process has four sequences in a step, which every half of it divides."""

_REPETITIONS = 3

SUCCEEDS, PASSES, SUSPENDED, RUN_DELETED = "succeeds", "passes", "suspended", "run deleted"
KILLED, EVICTED, NODE_LOST, OOM = "killed", "evicted", "node lost", "out of host memory"
POD_DELETED, JOB_DELETED, CRASHES, OVERDUE = "pod deleted", "Job deleted", "crashes", "overdue"
NO_IMAGE, NO_SECRET, NAME_TAKEN, REFUSED = "no image", "no secret", "name taken", "runtime refuses"
STALLS, TOLD = "stalls", "succeeds once its progress was told"

_LOST = FailureClass.POD_LOST

ENDINGS: Mapping[str, tuple[FailureClass, ...]] = {
    **{str(rule.failure_class): (rule.failure_class,) for rule in RULES.values() if rule.exit_code is not None},
    SUCCEEDS: (),
    PASSES: (),
    SUSPENDED: (),
    RUN_DELETED: (),
    CRASHES: (FailureClass.INTERNAL,),
    KILLED: (_LOST,),
    EVICTED: (FailureClass.EVICTED,),
    NODE_LOST: (FailureClass.NODE_LOST, _LOST),
    POD_DELETED: (FailureClass.CHECKPOINTED, _LOST),
    JOB_DELETED: (_LOST, FailureClass.CHECKPOINTED),
    OOM: (FailureClass.HOST_OUT_OF_MEMORY,),
    OVERDUE: (FailureClass.DEADLINE_EXCEEDED,),
    NO_IMAGE: (FailureClass.IMAGE_PULL_FAILED,),
    NO_SECRET: (FailureClass.POD_NOT_STARTED,),
    NAME_TAKEN: (FailureClass.NAME_CONFLICT,),
    REFUSED: (FailureClass.RUNTIME_REFUSED,),
    STALLS: (FailureClass.STALLED,),
    TOLD: (),
}
"""How a preflight or an attempt can end, and the classes that may be put on record for it.

A trainer that fails by itself ends as its class is called. Where there are two classes, it depends on who is faster:
a pod that is gone before any operator has seen its last words is lost. What counts is the same for both.
"""

_IMPATIENT = {"stallTimeoutSeconds": 10}
"""The shortest that there is. All pods speak each second, but for those that stall."""

_CHARGED = ("Internal", "PeerLost", "GPUKernelFailed", CRASHES)
_FREE = (KILLED, EVICTED, NODE_LOST, POD_DELETED, JOB_DELETED, "Checkpointed", "StoreUnavailable")
_FINAL = tuple(
    str(rule.failure_class)
    for rule in RULES.values()
    if rule.exit_code is not None and not rule.retried and rule.failure_class is not FailureClass.GPU_OUT_OF_MEMORY
)


@dataclass(frozen=True)
class Story:
    """A run. ``at``: seconds after the start at which it is created; ``runs_for``: those that its pods run at least.

    ``preflights`` is empty for a run without. ``stuck``: every failure happens at the same step.
    """

    name: str
    kind: str
    attempts: tuple[str, ...] = ()
    preflights: tuple[str, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    stuck: bool = False
    namespace: str = ""
    at: float = 0.0
    pause: float = 0.0
    runs_for: float = 0.0

    @property
    def runtime(self) -> str:
        """The ClusterLoRARuntime that it names."""
        if REFUSED in self.preflights:
            return "narrow"
        return "checked" if self.preflights else "unchecked"

    def ending(self, attempt: int, preflight: int = 0) -> str | None:
        """How an attempt, or a preflight, ends; ``None`` for one that the story does not have."""
        number, endings = (preflight, self.preflights) if preflight else (attempt, self.attempts)
        return endings[number - 1] if 1 <= number <= len(endings) else None


@dataclass(frozen=True)
class Outcome:
    """Where a run ends. ``phase`` None: it is gone. ``failures``: the classes of each, any of which is right.

    ``told``: all of its progress was told. That of others may be, as far as somebody was there to read it.
    """

    phase: Phase | None
    attempt: int = 0
    charged: int = 0
    failures: tuple[tuple[FailureClass, ...], ...] = ()
    failed_preflights: int = 0
    micro_batch: int | None = None
    told: bool = False
    children: bool = True


def compute_outcome(story: Story) -> Outcome:
    """The right end of ``story``.

    Raises:
        ValueError: the story goes on after its end, or has none.
    """
    policy = RunPolicy.model_validate(story.policy)
    endings = [(0, ending) for ending in story.preflights] + list(enumerate(story.attempts, 1))
    failures: list[tuple[int, str]] = []
    charged, micro_batch = 0, None
    for place, (attempt, ending) in enumerate(endings):
        phase: Phase | None = Phase.SUCCEEDED
        if ending in (PASSES, SUSPENDED):
            continue
        if ENDINGS[ending]:
            failures.append((attempt, ending))
            rule = RULES[ENDINGS[ending][0]]
            half = _halve(ending, micro_batch or MICRO_BATCH) if policy.on_out_of_memory != "fail" else None
            used_up = rule.charged and charged >= policy.max_restarts
            if (rule.retried or half) and not used_up and not (rule.charged and _repeats(story, failures)):
                charged, micro_batch = charged + rule.charged, half or micro_batch
                continue
            phase = Phase.FAILED
        if place + 1 < len(endings):
            raise ValueError(f"{story.name} goes on after its end: {endings}")
        gone = ending == RUN_DELETED or policy.ttl_deletes == "run"
        return Outcome(
            phase=None if gone else phase,
            attempt=attempt,
            charged=charged,
            failures=tuple(ENDINGS[ending] for _, ending in failures),
            failed_preflights=sum(1 for number, _ in failures if not number),
            micro_batch=micro_batch,
            told=ending == TOLD,
            children=not gone and policy.ttl_seconds_after_finished is None,
        )
    raise ValueError(f"{story.name} has no end: {endings}")


def _halve(ending: str, size: int) -> int | None:
    """The micro-batch after one of ``size`` was too large; ``None``: that is not what failed, or it cannot be less."""
    return size // 2 or None if ending in (OOM, "GPUOutOfMemory") else None


def _repeats(story: Story, failures: Sequence[tuple[int, str]]) -> bool:
    last = [ending for _, ending in failures[-_REPETITIONS:]]
    return story.stuck and len(last) == _REPETITIONS and len(set(last)) == 1


Draw = random.Random


def _some(draw: Draw, endings: Sequence[str], least: int, most: int) -> tuple[str, ...]:
    return tuple(draw.choice(endings) for _ in range(draw.randint(least, most)))


def _mixed(draw: Draw) -> dict[str, Any]:
    endings = [*_some(draw, _CHARGED, 1, 2), *_some(draw, _FREE, 1, 2), SUSPENDED]
    draw.shuffle(endings)
    return {"attempts": (*endings, SUCCEEDS)}


def _exhausted(draw: Draw) -> dict[str, Any]:
    limit = draw.randint(0, 2)
    return {"attempts": _some(draw, _CHARGED, limit + 1, limit + 1), "policy": {"maxRestarts": limit}}


def _shrinks(draw: Draw) -> dict[str, Any]:
    endings = _some(draw, ("GPUOutOfMemory", OOM), 1, 2)
    return {"attempts": (*endings, SUCCEEDS), "policy": {"onOutOfMemory": "shrinkMicroBatch"}}


def _finished(draw: Draw, **policy: Any) -> dict[str, Any]:
    return {"attempts": (draw.choice((SUCCEEDS, "BadData")),), "policy": {"ttlSecondsAfterFinished": 1, **policy}}


_KINDS: Mapping[str, Callable[[Draw], dict[str, Any]]] = {
    "succeeds at once": lambda draw: {"attempts": (SUCCEEDS,)},
    "restarts, then succeeds": lambda draw: {"attempts": (*_some(draw, _CHARGED, 1, 3), SUCCEEDS)},
    "is interrupted, then succeeds": lambda draw: {"attempts": (*_some(draw, _FREE, 1, 3), SUCCEEDS)},
    "has all sorts of trouble": _mixed,
    "fails for good": lambda draw: {"attempts": (draw.choice(_FINAL),)},
    "fails for good later": lambda draw: {"attempts": (*_some(draw, _CHARGED + _FREE, 1, 2), draw.choice(_FINAL))},
    "has no restarts left": _exhausted,
    "is interrupted again and again": lambda draw: {"attempts": (*_some(draw, _FREE, 5, 6), SUCCEEDS)},
    "fails at one step": lambda draw: {
        "attempts": (draw.choice(_CHARGED[:-1]),) * _REPETITIONS, "policy": {"maxRestarts": 9}, "stuck": True
    },
    "shrinks its micro-batch": _shrinks,
    "cannot shrink any more": lambda draw: {
        "attempts": _some(draw, ("GPUOutOfMemory", OOM), 3, 3), "policy": {"onOutOfMemory": "shrinkMicroBatch"}
    },
    "runs out of memory": lambda draw: {"attempts": (draw.choice(("GPUOutOfMemory", OOM)),)},
    "stalls, then succeeds": lambda draw: {
        "attempts": (*[STALLS] * draw.randint(1, 2), SUCCEEDS), "policy": _IMPATIENT
    },
    "tells of its progress": lambda draw: {"attempts": (*_some(draw, _FREE, 0, 1), TOLD), "policy": _IMPATIENT},
    "is suspended": lambda draw: {"attempts": (*[SUSPENDED] * draw.randint(1, 2), SUCCEEDS)},
    "is created suspended": lambda draw: {"attempts": (SUCCEEDS,), "policy": {"suspend": True}},
    "is deleted": lambda draw: {"attempts": (*_some(draw, _CHARGED, 0, 1), RUN_DELETED)},
    "is overdue": lambda draw: {
        "attempts": (OVERDUE,), "policy": {"activeDeadlineSeconds": draw.randint(1, 4)}
    },
    "is cleared up": _finished,
    "is overdue and cleared up": lambda draw: {
        "attempts": (OVERDUE,), "policy": {"activeDeadlineSeconds": draw.randint(1, 4), "ttlSecondsAfterFinished": 1}
    },
    "is deleted after its end": lambda draw: _finished(draw, ttlDeletes="run"),
    "passes its preflight": lambda draw: {"preflights": (PASSES,), "attempts": (SUCCEEDS,)},
    "fails its preflight": lambda draw: {"preflights": (draw.choice(_FINAL),)},
    "repeats its preflight": lambda draw: {
        "preflights": (*_some(draw, ("StoreUnavailable", EVICTED), 1, 2), PASSES), "attempts": (SUCCEEDS,)
    },
    "cannot start its pods": lambda draw: {"attempts": (draw.choice((NO_IMAGE, NO_SECRET)),)},
    "has its name taken": lambda draw: {"attempts": (NAME_TAKEN,)},
    "is refused by its runtime": lambda draw: {"preflights": (REFUSED,)},
}  # fmt: skip
KINDS = tuple(_KINDS)

_RUNS_A_NAMESPACE = 10


def make_stories(seed: int, count: int, seconds: float, runs_for: float) -> tuple[Story, ...]:
    """``count`` stories that begin within ``seconds``, of every kind as many; their pods run up to ``runs_for``."""
    draw = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    draw.shuffle(kinds)
    times = sorted(draw.uniform(0.0, seconds) for _ in kinds)
    return tuple(
        Story(
            name=f"run-{number}",
            namespace=f"team-{number // _RUNS_A_NAMESPACE}",
            kind=kind,
            at=at,
            pause=draw.uniform(0.0, runs_for / 4),
            runs_for=draw.uniform(0.0, runs_for),
            **_KINDS[kind](draw),
        )
        for number, (kind, at) in enumerate(zip(kinds, times, strict=True))
    )
