"""The kinds of stories, and how a seed makes stories of them. Pure."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.soak.stories import (
    CRASHES,
    EVICTED,
    JOB_DELETED,
    KILLED,
    LIMITS,
    NAME_TAKEN,
    NATIVE_SIDECAR,
    NO_IMAGE,
    NO_SECRET,
    NODE_FULL,
    NODE_LOST,
    OOM,
    OVERDUE,
    PASSES,
    POD_DELETED,
    QUOTA,
    REFUSED,
    REJECTED,
    REPETITIONS,
    RUN_DELETED,
    SIDECAR,
    STALLS,
    SUCCEEDS,
    SUSPENDED,
    TOLD,
    Story,
)
from lora_api import RULES, FailureClass

_IMPATIENT = {"stallTimeoutSeconds": 10}
"""The shortest that there is. All pods speak each second, but for those that stall."""

_CHARGED = ("Internal", "PeerLost", "GPUKernelFailed", CRASHES)
_FREE = (
    KILLED, EVICTED, NODE_FULL, NODE_LOST, POD_DELETED, JOB_DELETED, "Checkpointed", "StoreUnavailable", "AuthDenied",
    "GPUFault",
)  # fmt: skip
_FINAL_AT_FIRST = tuple(
    str(rule.failure_class)
    for rule in RULES.values()
    if rule.exit_code is not None
    and not rule.retried
    and not rule.elsewhere
    and rule.failure_class is not FailureClass.GPU_OUT_OF_MEMORY
)
_FINAL = tuple(one for one in _FINAL_AT_FIRST if not RULES[FailureClass(one)].outage)

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


def _rejected(draw: Draw) -> dict[str, Any]:
    endings = [*[REJECTED] * draw.randint(1, 2), draw.choice(_CHARGED)]
    draw.shuffle(endings)
    return {"attempts": (*endings, SUCCEEDS)}


def _beside(draw: Draw) -> dict[str, Any]:
    return {"attempts": (*_some(draw, _CHARGED + _FREE, 0, 2), draw.choice((SUCCEEDS, SUCCEEDS, "BadData")))}


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
        "attempts": (draw.choice(_CHARGED[:-1]),) * REPETITIONS, "policy": {"maxRestarts": 9}, "stuck": True
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
    "fails its preflight": lambda draw: {"preflights": (draw.choice(_FINAL_AT_FIRST),)},
    "repeats its preflight": lambda draw: {
        "preflights": (*_some(draw, ("StoreUnavailable", EVICTED), 1, 2), PASSES), "attempts": (SUCCEEDS,)
    },
    "cannot start its pods": lambda draw: {"attempts": (draw.choice((NO_IMAGE, NO_SECRET)),)},
    "has its name taken": lambda draw: {"attempts": (NAME_TAKEN,)},
    "is refused by its runtime": lambda draw: {"preflights": (REFUSED,)},
    "meets nodes that refuse pods": _rejected,
    "has a sidecar in its pods": lambda draw: {**_beside(draw), "preflights": (PASSES,), "sidecar": SIDECAR},
    "has a native sidecar in its pods": lambda draw: {**_beside(draw), "sidecar": NATIVE_SIDECAR},
    "waits for a quota": lambda draw: {
        "attempts": (*_some(draw, _FREE, 0, 1), SUCCEEDS), "preflights": draw.choice(((), (PASSES,))),
        "rule": QUOTA, "quota": draw.randint(0, 1),
    },
    "has limits put on its containers": lambda draw: {
        "preflights": (PASSES,), "attempts": (SUCCEEDS,), "rule": LIMITS
    },
}  # fmt: skip
KINDS = tuple(_KINDS)

KNOWN_BEFORE = frozenset(
    {"succeeds at once", "is suspended", "is created suspended", "is deleted", "passes its preflight"}
)
"""Kinds that end alike under the release before this one, which begins the soak."""

_RUNS_A_NAMESPACE = 10


def make_stories(seed: int, count: int, seconds: float, runs_for: float, early: float = 0.0) -> tuple[Story, ...]:
    """``count`` stories that begin within ``seconds``, of every kind as many; their pods run up to ``runs_for``.

    In the first ``early`` seconds there are those only that the release before knows, as far as there are enough.
    """
    draw = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    draw.shuffle(kinds)
    times = sorted(draw.uniform(0.0, seconds) for _ in kinds)
    _bring_forward(kinds, sum(1 for at in times if at < early))
    return tuple(
        Story(
            name=f"run-{number}",
            kind=kind,
            at=at,
            pause=draw.uniform(0.0, runs_for / 4),
            runs_for=draw.uniform(0.0, runs_for),
            namespace=f"ruled-{number}" if told.get("rule") else f"team-{number // _RUNS_A_NAMESPACE}",
            **told,
        )
        for number, (kind, at) in enumerate(zip(kinds, times, strict=True))
        for told in [_KINDS[kind](draw)]
    )


def _bring_forward(kinds: list[str], early: int) -> None:
    """Swaps kinds so that the first ``early`` of them are known to the release before, as far as there are as many."""
    for place in range(early):
        if kinds[place] in KNOWN_BEFORE:
            continue
        later = next((other for other in range(early, len(kinds)) if kinds[other] in KNOWN_BEFORE), None)
        if later is not None:
            kinds[place], kinds[later] = kinds[later], kinds[place]
