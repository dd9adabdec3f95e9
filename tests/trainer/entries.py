"""What a forked training process runs in place of the trainer, to fail as healthy CPUs do not."""

import os
from pathlib import Path
from typing import Any

from lora_trainer.packed import find_packed
from lora_trainer.worker import run_worker


def out_of_gpu_memory(run_file: Path) -> int:
    """A real worker whose first step meets the error of a GPU that is full."""
    import torch
    from transformers import Trainer

    def training_step(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.10 GiB")

    Trainer.training_step = training_step
    return run_worker(run_file)


def flipped_bit(run_file: Path) -> int:
    """A real worker on whose rank 1 one bit of a packed weight changes, as soon as the weights are sharded."""
    import lora_trainer.train
    from tests.trainer.gang_bits import flip_bit

    spread = lora_trainer.train.spread_model

    def spread_and_flip(model: Any, *rest: Any) -> None:
        spread(model, *rest)
        if os.environ["RANK"] == "1":
            flip_bit(find_packed(model)[0].here)

    lora_trainer.train.spread_model = spread_and_flip
    return run_worker(run_file)


def bit_that_flips_in_step_3(run_file: Path) -> int:
    """A real worker on whose rank 1 one bit of a packed weight changes while it trains."""
    from transformers import Trainer

    from tests.trainer.gang_bits import flip_bit

    step = Trainer.training_step

    def training_step(self: Any, model: Any, *rest: Any, **named: Any) -> Any:
        found = step(self, model, *rest, **named)
        if os.environ["RANK"] == "1" and self.state.global_step == 2 and not getattr(self, "flipped", False):
            flip_bit(find_packed(model)[0].here)
            self.flipped = True
        return found

    Trainer.training_step = training_step
    return run_worker(run_file)
