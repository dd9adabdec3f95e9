"""What happens around the steps of the training loop: progress, orderly stops, evaluations on the way."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_api.status import format_time
from lora_trainer.checkpoint import Checkpoints
from lora_trainer.errors import StoppedError, StoreUnavailableError
from lora_trainer.evaluate import Evaluation
from lora_trainer.line import Line
from lora_trainer.parallel import any_rank, sum_over_ranks
from lora_trainer.progress import Progress
from lora_trainer.stop import StopRequest


def now_text() -> str:
    """The time as metrics.jsonl has it."""
    return format_time(datetime.now(UTC))


class ProgressCallback(TrainerCallback):
    """Reports each logged step, and adds speed and time to the trainer's history of it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._tokens = 0.0
        self._time = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of the first step."""
        self._time = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Reports a step. ``num_tokens`` counts the tokens of all ranks since training began."""
        if not logs or "loss" not in logs:
            return
        now, tokens = time.monotonic(), float(logs.get("num_tokens", 0.0))
        speed = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        state.log_history[-1] |= {"tokens_per_second": round(speed, 1), "at": now_text()}
        self.progress.report_step(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=float(logs["grad_norm"]),
            tokens_per_second=round(speed, 1),
            skipped_steps=logs.get("skipped_steps"),
            reward_margin=logs.get("reward_margin"),
            reward_accuracy=logs.get("reward_accuracy"),
        )


class BoundaryCallback(TrainerCallback):
    """What all ranks decide together at the end of each step: whether to save a checkpoint, and whether to stop.

    One vote settles both: any rank may ask to stop, and rank 0 says whether a checkpoint is due, by its own clock.
    """

    def __init__(self, stop: StopRequest, checkpoints: Checkpoints, line: Line | None) -> None:
        self.stop, self.checkpoints, self.line = stop, checkpoints, line
        self.stopping = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the other ranks know how far this one is."""
        if self.line is not None:
            self.line.beat(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint after this step, if one is due, it is the last, or any rank was asked to stop."""
        due = args.process_index == 0 and self.checkpoints.due(state.global_step)
        stops, dues = sum_over_ranks([float(self.stop.requested), float(due)], args.device)
        if stops > 0:
            self.stopping = True
            self.stop.note()
        control.should_save = self.stopping or dues > 0 or state.global_step >= state.max_steps
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops if any rank was asked to, during the save at the latest.

        Raises:
            StoppedError: the checkpoint is complete.
            StoreUnavailableError: it is not.
        """
        step = state.global_step
        if not (self.stopping or any_rank(self.stop.requested, args.device)):
            return
        if self.checkpoints.saved == step:
            raise StoppedError(f"asked to stop; the checkpoint of step {step} is complete")
        older = "from the beginning" if self.checkpoints.saved is None else f"from step {self.checkpoints.saved}"
        raise StoreUnavailableError(
            f"asked to stop, and the checkpoint of step {step} could not be saved in the time that was left; the next "
            f"attempt goes on {older}"
        )


class EvaluationCallback(TrainerCallback):
    """Evaluates every so many steps (training.evalEverySteps), but not at the last: a run evaluates after it anyway.

    An evaluation may take longer than a pod is given to stop. So it is left when any rank is asked to stop, and the
    next attempt makes up for it before it goes on.
    """

    def __init__(self, every: int | None, progress: Progress, stop: StopRequest) -> None:
        self.every = every
        self.progress = progress
        self.stop = stop
        self.evaluate: Callable[[Callable[[], bool]], Evaluation | None] = lambda _: None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes up for an evaluation that was left."""
        if state.global_step and not any(
            "eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history
        ):
            self.on_step_end(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluates on all ranks, and keeps the loss in the trainer's history."""
        step = state.global_step
        if self.every is None or step % self.every or step >= state.max_steps:
            return
        self.progress.stage("evaluating")
        found = self.evaluate(lambda: any_rank(self.stop.requested, args.device))
        self.progress.stage("training")
        if found is not None and found.loss is not None:
            state.log_history.append({"step": step, "epoch": state.epoch, **found.scores, "at": now_text()})
            self.progress.report_eval(step=step, total_steps=state.max_steps, epoch=state.epoch, **found.scores)
