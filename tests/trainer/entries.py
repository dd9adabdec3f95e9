"""What a forked training process runs in place of the trainer, to fail as no CPU can."""

from pathlib import Path
from typing import Any

from lora_trainer.worker import run_worker


def out_of_gpu_memory(run_file: Path) -> int:
    """A real worker whose first step meets the error of a GPU that is full."""
    import torch
    from transformers import Trainer

    def training_step(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.10 GiB")

    Trainer.training_step = training_step
    return run_worker(run_file)


def hang_in_the_served_evaluation(run_file: Path) -> int:
    """A real worker that says when it has measured the base as it is served, and then waits to be ended."""
    import sys
    import time

    import lora_trainer.served

    def hang(*_: Any) -> None:
        sys.stderr.write("in the served evaluation\n")
        time.sleep(600)

    lora_trainer.served.assign_adapter = hang
    return run_worker(run_file)
