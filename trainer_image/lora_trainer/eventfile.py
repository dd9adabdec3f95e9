"""TensorBoard's event file, written at the end from the metrics: one file for all attempts, each step in it once."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lora_trainer.metrics import Metric

TAGS = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "epoch": "train/epoch",
    "reward_margin": "reward/margin",
    "reward_accuracy": "reward/accuracy",
}
"""Names of the charts."""


def write_event_file(metrics: Sequence[Metric], name: str, directory: Path) -> Path:
    """Writes the file and returns it. Equal metrics give equal bytes, its name too: ``name`` is the run's.

    TensorBoard finds event files by ``tfevents`` in their names, and reads a number after it as a time.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    times = [seconds for metric in metrics if (seconds := _seconds(metric)) is not None]
    first = min(times, default=0.0)
    target = directory / f"events.out.tfevents.{round(first)}.{name}"
    with target.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=first, file_version="brain.Event:2").SerializeToString())
        for metric in metrics:
            values = [
                Summary.Value(tag=tag, simple_value=value)
                for field, tag in TAGS.items()
                if (value := getattr(metric, field)) is not None
            ]
            seconds = _seconds(metric)
            event = Event(
                wall_time=first if seconds is None else seconds, step=metric.step, summary=Summary(value=values)
            )
            writer.write(event.SerializeToString())
    return target


def _seconds(metric: Metric) -> float | None:
    return None if metric.at is None else datetime.fromisoformat(metric.at).timestamp()
