"""What the trainer tells the operator: progress lines on standard output and the termination message."""

import json
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lora_api._base import RecordModel
from lora_api.failures import FailureClass
from lora_api.status import AdapterStatus, Time

TERMINATION_LIMIT = 4096
"""Bytes that the kubelet keeps of a termination message."""

PROGRESS_KEY = "lora"


class ProgressLine(RecordModel):
    """One line of rank 0's standard output: ``{"lora": {"event": ...}}``.

    stage: what the trainer is doing now, in ``stage``. step: after an optimizer step. eval: after an evaluation.
    """

    event: Literal["stage", "step", "eval"]
    at: Time
    stage: Literal["loading", "evaluating", "training", "checkpointing", "publishing", "done"] | None = None
    step: int | None = Field(None, ge=0)
    total_steps: int | None = Field(None, ge=0)
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None

    def to_line(self) -> str:
        """The line, without a line end."""
        return json.dumps({PROGRESS_KEY: self.to_wire()}, separators=(",", ":"))


def parse_progress_line(line: str) -> ProgressLine | None:
    """The progress in ``line``, or ``None`` if it is any other output. Never raises: the line comes from a log.

    A log line read with timestamps may carry one in front, which is ignored.
    """
    start = line.find('{"' + PROGRESS_KEY + '"')
    if start < 0:
        return None
    try:
        value = json.loads(line[start:])
        return ProgressLine.model_validate(value[PROGRESS_KEY])
    except (ValueError, ValidationError, RecursionError):
        return None


class Termination(RecordModel):
    """The trainer's last words (``/dev/termination-log``)."""

    version: Literal[1] = 1
    outcome: Literal["succeeded", "failed"]
    failure_class: FailureClass | None = Field(None, alias="class")
    message: Annotated[str, Field(max_length=65536)] = ""
    remedy: str | None = None
    rank: int | None = Field(None, ge=0)
    step: int | None = Field(None, ge=0)
    at: Time
    adapter: AdapterStatus | None = None

    def to_message(self, limit: int = TERMINATION_LIMIT) -> str:
        """JSON of at most ``limit`` bytes in UTF-8. ``message`` is cut in its middle where it is too long."""
        text = self._dump()
        excess = len(text.encode()) - limit
        kept = self.message
        while excess > 0 and kept:
            kept = _cut_middle(kept, len(kept) - max(excess, 1) - 5)
            text = self.model_copy(update={"message": kept})._dump()
            excess = len(text.encode()) - limit
        return text

    def _dump(self) -> str:
        return json.dumps(self.to_wire(), separators=(",", ":"), ensure_ascii=False)


def _cut_middle(text: str, length: int) -> str:
    """``text`` cut to about ``length`` characters: an error's beginning and end say the most."""
    if length <= 10:
        return ""
    half = length // 2
    return text[:half] + " ... " + text[-half:]


def parse_termination(message: str | None) -> Termination | None:
    """The trainer's last words, or ``None`` if there are none (killed, or an image that is not ours)."""
    if not message:
        return None
    try:
        return Termination.model_validate_json(message)
    except ValidationError:
        return None
