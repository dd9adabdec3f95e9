"""Steps whose loss or gradient is not a finite number are skipped, by all ranks alike; too many in a row end the run.

One such step would write NaN into every weight and into the optimizer's moments for good. A single record may cause it
(a rare token, an overflow), and a run of days should not end for it; three in a row are the weights' own doing.
"""

import math
import sys
from typing import Any

import torch
from transformers import Trainer

from lora_trainer.errors import DivergedError
from lora_trainer.parallel import any_rank
from lora_trainer.sharding import clip_gradients

MAX_SKIPPED_IN_A_ROW = 3


class FiniteTrainer(Trainer):
    """A Trainer that takes no step that is not finite. Weights, moments and learning rate stay as they were.

    The step counts as one of ``max_steps``: its records were seen.
    """

    skipped = 0
    """Steps that were skipped since the run began. Kept in checkpoints, as ``skipped_in_a_row`` is."""
    skipped_in_a_row = 0
    _skipped_since_log = 0
    _taken_since_log = 0
    _losses_finite: torch.Tensor | None = None
    _loss_before_step: torch.Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch. Returns its loss, or 0 where that is not finite.

        The loop adds the losses up, and would never get rid of a NaN in that sum. Nothing is read back from the GPU.
        """
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        finite = torch.isfinite(loss)
        if self._losses_finite is None:
            self._losses_finite, self._loss_before_step = finite, self._tr_loss.clone()
        else:
            self._losses_finite = self._losses_finite & finite
        return torch.where(finite, loss, torch.zeros_like(loss))

    def _clip_grad_norm(self, model: torch.nn.Module) -> float:
        """Clips the gradient. Where it or a loss is not finite on any rank, drops it instead.

        Without gradients the optimizer's step leaves weights and moments alone, and the loop does not move the
        learning rate when accelerate says that a step was skipped.
        """
        value = clip_gradients(model, self.args.max_grad_norm)
        losses = self._losses_finite is None or bool(self._losses_finite)
        skip = any_rank(not (losses and math.isfinite(value)), self.args.device)
        self._mark_skipped(skip)
        if skip:
            model.zero_grad(set_to_none=True)
            self._count_skipped("a loss" if math.isfinite(value) else f"the gradient's norm ({value})")
        else:
            self.skipped_in_a_row = 0
            self._taken_since_log += 1
        self._losses_finite = None
        return value

    def _mark_skipped(self, skip: bool) -> None:
        self.optimizer._is_overflow = skip  # noqa: SLF001 - what accelerate sets for a scaler that overflows

    def _count_skipped(self, what: str) -> None:
        """Notes a skipped step.

        Raises:
            DivergedError: it is the third in a row. On all ranks alike.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._skipped_since_log += 1
        if self._loss_before_step is not None:
            self._tr_loss.copy_(self._loss_before_step)
        step = self.state.global_step + 1
        if self.args.process_index == 0:
            sys.stderr.write(f"step {step} was skipped: {what} is not a finite number; no weight was changed\n")
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"step {step}: {what} is no longer a finite number, the {MAX_SKIPPED_IN_A_ROW}rd time in a row; no "
                "weight was changed by these steps, and the last checkpoint is from before or between them"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the mean loss over the steps that were taken; NaN where there were none."""
        if "loss" in logs and self._skipped_since_log:
            taken = self._taken_since_log
            steps = taken + self._skipped_since_log
            logs["loss"] = logs["loss"] * steps / taken if taken else math.nan
        if "loss" in logs:
            self._skipped_since_log = self._taken_since_log = 0
            if self.skipped:
                logs["skipped_steps"] = self.skipped
        super().log(logs, *args, **kwargs)
