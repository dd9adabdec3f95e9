"""How this pod ended: exit code and last words, from what its training processes left and how each of them ended.

A process that fails by itself leaves a reason (``outcome``). One that a library or the kernel ends leaves none. NCCL's
watchdog aborts when a peer is silent, and also when its own GPU failed: only what it printed tells one from the other.
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lora_api.failures import CLASS_BY_EXIT_CODE, NEW_RUN, RULES, FailureClass
from lora_api.messages import Termination
from lora_trainer.lastwords import find_last_words, with_gpu
from lora_trainer.outcome import WorkerError, read_errors, read_result, root_cause
from lora_trainer.settings import stop_grace_seconds

KILLED_CODE = 128 + signal.SIGKILL
STOPPED_CODE = 128 + signal.SIGTERM

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the pod's own
ALMOST_FULL = 0.02
"""Share of /dev/shm: with less free than that, it was full when a page of it was asked for."""

_BY_ITSELF = frozenset({signal.SIGKILL, signal.SIGTERM})
"""Signals that come from outside: what the process printed does not explain them."""


@dataclass(frozen=True)
class ProcessEnd:
    """How one training process ended. ``code`` is negative for a signal, ``at`` seconds since the epoch.

    ``ended_here``: the launcher killed it. ``last_lines``: the end of what it printed.
    """

    code: int
    at: float
    ended_here: bool = False
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Why a process ended that left no reason. ``remedy`` is set where more is known than of its whole class."""

    failure_class: FailureClass
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class PodEnd:
    """How the training processes of a pod ended, by their local ranks. ``stopped``: the pod was asked to stop."""

    ends: Mapping[int, ProcessEnd]
    processes: int
    first_rank: int
    gpus: bool
    stopped: bool
    killed_by_memory: bool


def conclude(pod: PodEnd, state: Path) -> tuple[int, Termination]:
    """Exit code and last words of ``pod``, whose processes left their reasons in ``state``."""
    if all(end.code == 0 for end in pod.ends.values()) and len(pod.ends) == pod.processes:
        return 0, Termination(outcome="succeeded", at=datetime.now(UTC), adapter=read_result(state))
    killed = [rank for rank, end in pod.ends.items() if end.code == -signal.SIGKILL]
    if pod.killed_by_memory and killed:
        return KILLED_CODE, make_words(
            FailureClass.HOST_OUT_OF_MEMORY,
            "a training process passed the pod's memory limit and was ended by the kernel",
            rank=pod.first_rank + killed[0],
        )
    errors = read_errors(state)
    cause = root_cause([*errors, *_unexplained(pod, {error.rank for error in errors})])
    if cause is None:
        return conclude_without(FailureClass.INTERNAL, "the training processes were not started")
    visible = os.environ.get("NVIDIA_VISIBLE_DEVICES")
    message = cause.message
    if pod.gpus:
        message = with_gpu(message, cause.failure_class, cause.rank - pod.first_rank, visible)
    words = make_words(cause.failure_class, message, cause.remedy, rank=cause.rank, step=cause.step).model_copy(
        update={
            "micro_batch_size": cause.micro_batch_size,
            "checkpoint_step": max((error.checkpoint_step or 0 for error in errors), default=0) or None,
            "at": datetime.fromtimestamp(cause.at, UTC),
        }
    )
    return exit_code(cause.failure_class), words


def conclude_without(failure_class: FailureClass, message: str) -> tuple[int, Termination]:
    """Exit code and last words of a pod whose training processes have nothing to do with it."""
    return exit_code(failure_class), make_words(failure_class, message)


def exit_code(failure_class: FailureClass) -> int:
    """The pod's exit code; for a class that has none of the trainer's, that of a container which was killed."""
    if failure_class is FailureClass.HOST_OUT_OF_MEMORY:
        return KILLED_CODE
    code = RULES[failure_class].exit_code
    return STOPPED_CODE if code is None else code


def make_words(
    failure_class: FailureClass, message: str, remedy: str = "", *, rank: int | None = None, step: int | None = None
) -> Termination:
    """Last words of a pod that failed."""
    return Termination(
        outcome="failed",
        failure_class=failure_class,
        message=message[:65536],
        remedy=remedy or RULES[failure_class].remedy,
        rank=rank,
        step=step,
        at=datetime.now(UTC),
    )


def _unexplained(pod: PodEnd, explained: set[int]) -> list[WorkerError]:
    """Errors for the processes that ended without leaving one."""
    found = []
    for local_rank, end in pod.ends.items():
        rank = pod.first_rank + local_rank
        if end.code == 0 or rank in explained:
            continue
        why = explain_end(end, stopped=pod.stopped)
        found.append(WorkerError(rank, why.failure_class, why.message, end.at, remedy=why.remedy))
    return found


def explain_end(end: ProcessEnd, *, stopped: bool) -> Explanation:
    """Why a process ended that left no reason, by its code and by what the libraries in it said last."""
    if end.ended_here and stopped:
        return Explanation(
            FailureClass.POD_LOST,
            f"asked to stop, and no checkpoint was complete within {stop_grace_seconds():.0f} s; the next attempt goes "
            "on from the last complete checkpoint",
        )
    if end.ended_here:
        return Explanation(FailureClass.PEER_LOST, "ended by the launcher after another process of the pod had failed")
    if stopped and end.code == -signal.SIGTERM:
        return Explanation(FailureClass.CHECKPOINTED, "asked to stop before it had begun")
    if end.code in CLASS_BY_EXIT_CODE:
        return Explanation(CLASS_BY_EXIT_CODE[end.code], f"{_how(end.code)}; see the log")
    if -end.code in _BY_ITSELF:
        return Explanation(FailureClass.INTERNAL, _how(end.code))
    said, row = find_last_words(end.last_lines)
    if row is not None:
        return Explanation(row.failure_class, f"{_how(end.code)}: {said}", row.remedy)
    if end.code == -signal.SIGBUS:
        return _explain_bus_error(SHARED_MEMORY)
    return Explanation(FailureClass.INTERNAL, f"{_how(end.code)}: {said}" if said else f"{_how(end.code)}; see the log")


def _how(code: int) -> str:
    if code < 0:
        return f"the training process was ended by {signal.Signals(-code).name}"
    return f"the training process ended with exit code {code} without a word"


def _explain_bus_error(shared_memory: Path) -> Explanation:
    """SIGBUS is a page of a mapped file that cannot be had: where /dev/shm is full, one of it."""
    how = f"{_how(-signal.SIGBUS)}: a page of a file that it had mapped could not be had"
    try:
        found = os.statvfs(shared_memory)
    except OSError:
        return Explanation(FailureClass.INTERNAL, f"{how}; see the log")
    size, free = (blocks * found.f_frsize / 2**20 for blocks in (found.f_blocks, found.f_bavail))
    if free > size * ALMOST_FULL:
        where = f"It was none of /dev/shm, which has {free:.0f} of {size:.0f} MiB free: look at the volumes of the pod"
        return Explanation(FailureClass.INTERNAL, f"{how}. {where} and at dmesg of the node")
    return Explanation(
        FailureClass.LIMIT_TOO_LOW,
        f"{how}, and the pod's /dev/shm of {size:.0f} MiB is full",
        "Raise podTemplate.resources.limits.memory, and sizeLimit of the volume at /dev/shm where a runtime sets one. "
        f"That takes {NEW_RUN}.",
    )
