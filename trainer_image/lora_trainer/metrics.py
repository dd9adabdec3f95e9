"""metrics.jsonl: one JSON object for each logged step and each evaluation, in the order of steps.

The source is the trainer's own history (``TrainerState.log_history``). It is part of every checkpoint, so that what
earlier attempts logged up to their last checkpoint is in it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_trainer.evaluate import Evaluation

METRICS_FILE = "metrics.jsonl"

OPTIONAL = (
    "epoch",
    "loss",
    "eval_loss",
    "eval_share",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "reward_margin",
    "reward_accuracy",
)


@dataclass(frozen=True)
class Metric:
    """What was measured at ``step``: by training (``loss``) or by an evaluation (``eval_loss``).

    ``eval_share`` is that of the records that greedy decoding writes to the letter (``lora_api.served.Score``). Losses
    are in nats per token, or with rewards (objective dpo, see ProgressLine) per pair. ``grad_norm`` is the L2
    norm before clipping, ``at`` is an RFC 3339 time.
    """

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    eval_share: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None
    at: str | None = None

    def to_line(self) -> str:
        """The JSON object, without what was not measured."""
        return json.dumps({name: value for name, value in vars(self).items() if value is not None})


def read_metrics(
    history: Iterable[dict[str, Any]], before: "Evaluation", after: "Evaluation", steps: int
) -> list[Metric]:
    """The metrics of a run of ``steps`` steps; ``before`` and ``after`` are those at its two ends.

    A number that is not finite is left out: JSON has no word for it.
    """
    entries = [dict(entry) for entry in history if "loss" in entry or "eval_loss" in entry]
    if before.loss is not None:
        entries.insert(0, {"step": 0, **before.scores, "at": before.at})
    if after.loss is not None:
        entries.append({"step": steps, **after.scores, "at": after.at})
    return [_read(entry) for entry in sorted(entries, key=lambda entry: int(entry["step"]))]


def write_metrics(metrics: Iterable[Metric]) -> str:
    """The content of metrics.jsonl."""
    return "".join(metric.to_line() + "\n" for metric in metrics)


def pick(metrics: Iterable[Metric], name: str) -> list[tuple[int, float]]:
    """Pairs of step and value of the measurement ``name``, where there is one."""
    if name not in {field.name for field in fields(Metric)}:
        raise KeyError(name)
    return [(metric.step, value) for metric in metrics if (value := getattr(metric, name)) is not None]


def _read(entry: dict[str, Any]) -> Metric:
    values = {name: _finite(entry.get(name)) for name in OPTIONAL}
    at = entry.get("at")
    return Metric(step=int(entry["step"]), at=str(at) if at else None, **values)


def _finite(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None
