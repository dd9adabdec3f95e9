"""What happens around the steps of the training loop: progress, orderly stops, evaluations on the way."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_api.status import format_time
from lora_trainer.errors import StoppedError
from lora_trainer.evaluate import Evaluation
from lora_trainer.parallel import any_rank
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
            reward_margin=logs.get("reward_margin"),
            reward_accuracy=logs.get("reward_accuracy"),
        )


class StopCallback(TrainerCallback):
    """Ends the run with a checkpoint when any rank was asked to stop. All ranks decide together, at a step's end."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.stopping = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint after this step, if any rank was asked to stop."""
        if any_rank(self.stop.requested, args.device):
            self.stopping = True
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops once the checkpoint is complete.

        Raises:
            StoppedError: always, if a stop was asked for.
        """
        if self.stopping:
            raise StoppedError(f"asked to stop; the checkpoint of step {state.global_step} is complete")


class EvaluationCallback(TrainerCallback):
    """Evaluates every so many steps (training.evalEverySteps), but not at the last: a run evaluates after it anyway."""

    def __init__(self, every: int | None, progress: Progress) -> None:
        self.every = every
        self.progress = progress
        self.evaluate: Callable[[], Evaluation] = lambda: Evaluation(None, [])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluates on all ranks, and keeps the loss in the trainer's history."""
        step = state.global_step
        if self.every is None or step % self.every or step >= state.max_steps:
            return
        found = self.evaluate()
        if found.loss is not None:
            state.log_history.append({"step": step, "epoch": state.epoch, **found.scores, "at": now_text()})
            self.progress.report_eval(step=step, total_steps=state.max_steps, epoch=state.epoch, **found.scores)
