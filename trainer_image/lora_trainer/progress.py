"""Progress: lines for the operator, which reads them from the pod's log, and to the trackers.

They go to the launcher through a pipe of their own (``relay``), since what else is printed may look like one.
"""

import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from lora_api.messages import ProgressLine
from lora_api.served import ServedEvaluation
from lora_trainer.settings import progress_descriptor
from lora_trainer.tracking import Trackers

Stage = Literal["loading", "evaluating", "training", "checkpointing", "publishing", "done"]


class Progress:
    """Writes progress lines. Silent on every rank but 0, so that callers need not ask."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.trackers = Trackers()
        self._descriptor = progress_descriptor()
        self.step = 0
        """Last optimizer step that was reported."""
        self.micro_batch_size: int | None = None
        """Sequences that this process takes at once, once that is settled."""
        self.checkpoint_step: int | None = None
        """Step of the newest complete checkpoint that this process knows of."""

    def note(self, text: str) -> None:
        """Says something to people who read the log."""
        if self.enabled:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def stage(self, stage: Stage) -> None:
        """Says what the trainer is doing now."""
        self._write("stage", stage=stage)

    def report_step(self, **fields: Any) -> None:
        """Reports an optimizer step. ``fields`` are those of ProgressLine."""
        self.step = int(fields["step"])
        self._write("step", **fields)

    def report_eval(self, **fields: Any) -> None:
        """Reports an evaluation. ``fields`` are those of ProgressLine."""
        self._write("eval", **fields)

    def report_served(self, step: int, found: ServedEvaluation | None) -> None:
        """Reports the evaluation on the base model as it is served, if there was one."""
        if found is not None and found.is_measured:
            self._write(
                "served",
                step=step,
                total_steps=step,
                served_loss=found.after.loss,
                served_share=found.after.share,
                training_loss=found.training.loss,
                training_share=found.training.share,
                served_records=found.records,
            )

    def report_memory(self, **fields: Any) -> None:
        """Reports what is planned or measured of memory. ``fields`` are those of ProgressLine."""
        self.micro_batch_size = fields.get("micro_batch_size")
        self._write("memory", **fields)

    def _write(self, event: Literal["stage", "step", "eval", "memory", "served"], **fields: Any) -> None:
        if self.enabled:
            line = ProgressLine(event=event, at=datetime.now(UTC), checkpoint_step=self.checkpoint_step, **fields)
            text = line.to_line() + "\n"
            if self._descriptor is None:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                os.write(self._descriptor, text.encode())
            self.trackers.tell(line)
