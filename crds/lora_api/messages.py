"""What the trainer tells the operator: progress lines on standard output and the termination message."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from lora_api._base import Measure, RecordModel, Time, clean_text, cut_middle
from lora_api.failures import FailureClass
from lora_api.preflight import PreflightOutcome
from lora_api.reading import MAX_WORD
from lora_api.status import AdapterStatus

TERMINATION_LIMIT = 4096
"""Bytes that the kubelet keeps of a termination message."""

PROGRESS_KEY = "lora"
PROGRESS_START = f'{{"{PROGRESS_KEY}"'
"""What a progress line begins with, and no other line of the log: the launcher sees to that."""

_TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,18}(Z|[+-][0-9]{2}:[0-9]{2}) ")
"""What the kubelet puts in front of a line that is read with timestamps."""

_MAX_INTEGER = 2**63 - 1

Text = Annotated[str, BeforeValidator(clean_text)]
Word = Annotated[str, Field(max_length=MAX_WORD)]
"""One of a list that a later version may have more of."""


class ProgressLine(RecordModel):
    """One line of rank 0's standard output: ``{"lora": {"event": ...}}``.

    stage: what the trainer is doing now, in ``stage`` (loading, evaluating, training, checkpointing, publishing, done).
    step: after an optimizer step. eval: after an evaluation.
    served: once the adapter was evaluated on the base model as it is served. ``served_loss`` and ``served_share`` are
    of ``served_records`` records, ``training_loss`` and ``training_share`` of the same on the base that was trained on.
    Shares (0 to 1) are those of ``served.Score``.
    memory: the micro-batch that was settled on and the planned peak, and after training the measured one, of the
    process that needed most (GiB; ``host_gib`` is its resident memory).
    Rewards are those of preference pairs (objective dpo): the mean margin between chosen and rejected, and the share of
    pairs (0 to 1) whose chosen answer has the larger one.
    ``checkpoint_step`` is in every line once there is a complete checkpoint, which was saved after that step.
    """

    event: Word
    at: Time
    stage: Word | None = None
    step: int | None = Field(None, ge=0)
    total_steps: int | None = Field(None, ge=0)
    epoch: Measure = None
    loss: Measure = None
    eval_loss: Measure = None
    eval_share: Measure = None
    served_loss: Measure = None
    served_share: Measure = None
    training_loss: Measure = None
    training_share: Measure = None
    served_records: int | None = Field(None, ge=0)
    learning_rate: Measure = None
    grad_norm: Measure = None
    tokens_per_second: Measure = None
    micro_batch_size: int | None = Field(None, ge=1)
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    planned_gib: Measure = Field(None, alias="plannedGiB")
    available_gib: Measure = Field(None, alias="availableGiB")
    allocated_gib: Measure = Field(None, alias="allocatedGiB")
    reserved_gib: Measure = Field(None, alias="reservedGiB")
    host_gib: Measure = Field(None, alias="hostGiB")
    skipped_steps: int | None = Field(None, ge=0)
    reward_margin: Measure = None
    reward_accuracy: Measure = None
    checkpoint_step: int | None = Field(None, ge=0)

    def to_line(self) -> str:
        """The line, without a line end."""
        return json.dumps({PROGRESS_KEY: self.to_wire()}, separators=(",", ":"))


def parse_progress_line(line: str) -> ProgressLine | None:
    """The progress in ``line``, or ``None`` if it is any other output. Never raises: the line comes from a log.

    It has to stand at the beginning, or behind the timestamp of a log that is read with timestamps: what quotes a
    progress line is none.
    """
    stamp = _TIMESTAMP.match(line)
    text = line[stamp.end() :] if stamp else line
    if not text.startswith(PROGRESS_START):
        return None
    try:
        return ProgressLine.model_validate(_load(text)[PROGRESS_KEY])
    except (ValueError, ValidationError, RecursionError):
        return None


def _load(text: str) -> Any:
    """JSON whose integers an object of the API server can hold: a status with a larger one is refused for ever."""
    return json.loads(text, parse_int=_parse_integer)


def _parse_integer(text: str) -> int:
    value = int(text)
    if abs(value) > _MAX_INTEGER:
        raise ValueError(f"{text[:40]} needs more than 64 bits")
    return value


class Termination(RecordModel):
    """The trainer's last words (``/dev/termination-log``).

    After success rank 0 says which ``adapter`` it published, and a preflight what it settled. ``checkpoint_step`` is
    that of the newest complete checkpoint.
    """

    version: int = Field(1, ge=1)
    outcome: Literal["succeeded", "failed"]
    failure_class: FailureClass | None = Field(None, alias="class")
    message: Text = ""
    remedy: Text | None = None
    rank: int | None = Field(None, ge=0)
    step: int | None = Field(None, ge=0)
    micro_batch_size: int | None = Field(None, ge=1)
    checkpoint_step: int | None = Field(None, ge=0)
    at: Time
    adapter: AdapterStatus | None = None
    preflight: PreflightOutcome | None = None

    def to_message(self, limit: int = TERMINATION_LIMIT) -> str:
        """JSON of at most ``limit`` bytes in UTF-8. Where it is too long, the longer of its texts is cut."""
        fitting = self
        while (excess := len(_dump(fitting).encode()) - limit) > 0:
            field = "remedy" if len(fitting.remedy or "") > len(fitting.message) else "message"
            text: str = getattr(fitting, field)
            if not text:
                break
            # A character is at least 1 byte and, escaped, at most 6: this never cuts too much.
            shorter = cut_middle(text, min(limit, len(text) - -(-excess // 6)))
            fitting = fitting.model_copy(update={field: shorter})
        return _dump(fitting)


def _dump(termination: Termination) -> str:
    return json.dumps(termination.to_wire(), separators=(",", ":"), ensure_ascii=False)


def parse_termination(message: str | None) -> Termination | None:
    """The trainer's last words, or ``None`` if there are none (killed, or an image that is not ours)."""
    if not message:
        return None
    try:
        return Termination.model_validate(_load(message))
    except (ValueError, ValidationError, RecursionError):
        return None
