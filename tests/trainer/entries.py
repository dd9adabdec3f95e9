"""What a forked training process runs in place of the trainer, to fail as no CPU can."""

from pathlib import Path
from typing import Any

import lora_trainer.train
from lora_trainer.worker import run_worker


def out_of_gpu_memory(run_file: Path) -> int:
    """A real worker whose training meets the error of a GPU that is full."""
    import torch

    def train(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.10 GiB")

    lora_trainer.train.train = train  # type: ignore[assignment]
    return run_worker(run_file)
