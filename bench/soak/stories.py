"""What happens to each run of the soak, and the one state in which it has to end. Pure: a seed gives the stories.

A story says how each preflight and attempt ends. What else befalls the cluster (faults.py) may make a run slower, and
changes nothing about its end, which ``compute_outcome`` tells by the failure table alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_api import RULES, FailureClass, Phase
from lora_api.finetune import RunPolicy

MICRO_BATCH = 4
"""training.microBatchSize of every run. Each process has four sequences in a step, which every half of it divides."""

REPETITIONS = 3

SUCCEEDS, PASSES, SUSPENDED, RUN_DELETED = "succeeds", "passes", "suspended", "run deleted"
KILLED, EVICTED, NODE_LOST = "killed", "evicted", "node lost"
OOM, NODE_FULL = "out of host memory", "ended by a full node"
POD_DELETED, JOB_DELETED, CRASHES, OVERDUE = "pod deleted", "Job deleted", "crashes", "overdue"
NO_IMAGE, NO_SECRET, NAME_TAKEN, REFUSED = "no image", "no secret", "name taken", "runtime refuses"
STALLS, TOLD, REJECTED = "stalls", "succeeds once its progress was told", "rejected by a node"

SIDECAR, NATIVE_SIDECAR = "sidecar", "native sidecar"
"""Containers that others put into pods: one beside the trainer, or one that starts before it and ends after it."""

QUOTA, LIMITS = "quota", "limits"
"""Rules of a namespace: a ResourceQuota that is too small until somebody raises it, or a LimitRange with defaults."""

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
    NODE_FULL: (FailureClass.EVICTED,),
    OVERDUE: (FailureClass.DEADLINE_EXCEEDED,),
    NO_IMAGE: (FailureClass.IMAGE_PULL_FAILED,),
    NO_SECRET: (FailureClass.POD_NOT_STARTED,),
    NAME_TAKEN: (FailureClass.NAME_CONFLICT,),
    REFUSED: (FailureClass.RUNTIME_REFUSED,),
    STALLS: (FailureClass.STALLED,),
    TOLD: (),
    REJECTED: (_LOST,),
}
"""How a preflight or an attempt can end, and the classes that may be put on record for it.

A trainer that fails by itself ends as its class is called. Where there are two classes, it depends on who is faster:
a pod that is gone before any operator has seen its last words is lost. What counts is the same for both.
"""


@dataclass(frozen=True)
class Story:
    """A run. ``at``: seconds after the start at which it is created; ``runs_for``: those that its pods run at least.

    ``preflights`` is empty for a run without. ``stuck``: every failure happens at the same step. ``sidecar``: the
    container that its pods get on top. ``rule``: what its namespace, which has no other run then, keeps to, and
    ``quota`` the pods that it allows at first.
    """

    name: str
    kind: str
    attempts: tuple[str, ...] = ()
    preflights: tuple[str, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    stuck: bool = False
    sidecar: str = ""
    rule: str = ""
    quota: int = 0
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

    @property
    def memory_limited(self) -> bool:
        """Whether its pods have a limit of memory. The kernel ends those that have none where their node is full."""
        return OOM in self.attempts

    def bad_nodes(self, attempt: int) -> int:
        """How many nodes the run has met up to ``attempt`` that reject every pod."""
        return self.attempts[:attempt].count(REJECTED)

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
            # The pods of an attempt that start tell of a step, so that the run has worked: what may pass is waited for.
            waits = rule.outage and attempt > 0 and ending not in (NO_IMAGE, NO_SECRET)
            if (rule.retried or waits or half) and not used_up and not (rule.charged and _repeats(story, failures)):
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
    last = [ending for _, ending in failures[-REPETITIONS:]]
    return story.stuck and len(last) == REPETITIONS and len(set(last)) == 1
