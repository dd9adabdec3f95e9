"""The newest complete checkpoint of a run, from what its trainer says. All pure.

A trainer says it in each line of progress and in its last words (``checkpointStep``). One of an older version does not:
it is judged by the step after which it says that it stopped with a complete checkpoint, by its words about the last
one, and by the step from which it goes on.
"""

import re
from collections.abc import Sequence

from lora_api import FailureClass, ProgressLine, Termination, parse_termination
from lora_operator.state.observed import Observed

MAX_STEP = 2**31 - 1
"""More optimizer steps than any run has: a larger one is not believed."""

_COMPLETE = re.compile(r"\bof step (\d{1,10}) is complete\b")
_LAST = re.compile(r"\bthe last one is of step (\d{1,10})\b")
"""How a trainer of an older version speaks of its last complete checkpoint."""


def hear_checkpoint(lines: Sequence[ProgressLine], known: int | None, logging_steps: int) -> int | None:
    """The step of the newest complete checkpoint that ``lines``, the end of an attempt's log, tell of.

    ``known`` is what the lines before them told.
    """
    told = [line.checkpoint_step for line in lines if line.checkpoint_step is not None]
    if not told:
        told = [step for step in [_resumed_from(lines, logging_steps)] if step is not None]
    return _newest([known, *told])


def find_checkpoint(observed: Observed, attempt: int) -> int | None:
    """The step of the newest complete checkpoint that the pods of ``attempt`` have told of."""
    words = [
        parse_termination(pod.ended.message)
        for pod in observed.pods
        if pod.attempt == attempt and pod.ended is not None
    ]
    return _newest([observed.reports.checkpoint_step, *(_told_by(said) for said in words if said is not None)])


def _resumed_from(lines: Sequence[ProgressLine], logging_steps: int) -> int | None:
    """The least step that an attempt can have gone on from, where its beginning is among ``lines``."""
    begun = False
    for line in lines:
        begun = begun or (line.event == "stage" and line.stage == "loading")
        if line.event == "step" and line.step is not None:
            return line.step - logging_steps if begun and line.step > logging_steps else None
    return None


def _told_by(said: Termination) -> int | None:
    if said.checkpoint_step is not None:
        return said.checkpoint_step
    if said.failure_class is FailureClass.CHECKPOINTED and said.step:
        return said.step
    steps = [int(step) for pattern in (_COMPLETE, _LAST) for step in pattern.findall(said.message)]
    return max(steps, default=None)


def _newest(steps: Sequence[int | None]) -> int | None:
    return max((step for step in steps if step is not None and 0 < step <= MAX_STEP), default=None)
