"""What a forked training process runs in place of the trainer, to fail as healthy CPUs do not."""

import os
import sys
from pathlib import Path
from typing import Any

from lora_trainer.gpuerrors import GPU_ERRORS
from lora_trainer.packed import find_packed
from lora_trainer.worker import run_worker

WATCHDOG = "[PG ID 0 PG GUID 0 Rank 1] Process group watchdog thread terminated with exception"


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


def bit_that_flips_after_training(run_file: Path) -> int:
    """A real worker on whose rank 1 one bit of a packed weight changes when the last checkpoint is written already."""
    from lora_trainer.sft import SupervisedTrainer
    from tests.trainer.gang_bits import flip_bit

    train = SupervisedTrainer.train_to_end

    def train_to_end(self: Any, *rest: Any) -> None:
        train(self, *rest)
        if os.environ["RANK"] == "1":
            flip_bit(find_packed(self.model)[0].here)

    SupervisedTrainer.train_to_end = train_to_end
    return run_worker(run_file)


def fail_as_libraries_do(run_file: Path) -> int:
    """A real worker whose training raises what the row GPU_ERROR of the table says, as its library does."""
    import lora_trainer.train

    error = raised_as(GPU_ERRORS[int(os.environ["GPU_ERROR"])].text)

    def train(*_: Any) -> None:
        raise error

    lora_trainer.train.train = train
    return run_worker(run_file)


def raised_as(text: str) -> Exception:
    """``text`` as the exception that it is raised as (torch 2.13, transformers 5.23)."""
    import torch
    from torch.distributed import DistBackendError, DistNetworkError

    kinds: dict[str, type[Exception]] = {
        "CUDA out of memory": torch.OutOfMemoryError,
        "CUDA error: CU": RuntimeError,  # TORCH_CUDABLAS_CHECK
        "CUDA error: ": torch.AcceleratorError,
        "NCCL error": DistBackendError,
        "The client socket": DistNetworkError,
        "lib": ImportError,
        "[Errno ": OSError,
        "Your setup": ValueError,
        "Torch not compiled": AssertionError,
        "Using RTX": NotImplementedError,
    }
    kind = next((kind for start, kind in kinds.items() if text.startswith(start)), RuntimeError)
    return kind(text)


def dying_gpu(run_file: Path) -> int:
    """A real worker. On rank 1, after step 2, a GPU dies: by DYING_GPU its error is raised, or the watchdog aborts."""
    from transformers import Trainer

    text = "CUDA error: uncorrectable ECC error encountered"
    step = Trainer.training_step

    def training_step(trainer: Any, *arguments: Any) -> Any:
        if os.environ.get("RANK") != "1" or trainer.state.global_step < 2:
            return step(trainer, *arguments)
        if os.environ["DYING_GPU"] == "raises":
            raise raised_as(text)
        sys.stderr.write(f"[rank1]:[E ProcessGroupNCCL.cpp:2093] {WATCHDOG}: {text}\nterminate called\n")
        sys.stderr.flush()
        os.abort()

    Trainer.training_step = training_step
    return run_worker(run_file)


def hang_in_the_served_evaluation(run_file: Path) -> int:
    """A real worker that says when it has measured the base as it is served, and then waits to be ended."""
    import time

    import lora_trainer.served

    def hang(*_: Any) -> None:
        sys.stderr.write("in the served evaluation\n")
        time.sleep(600)

    lora_trainer.served.assign_adapter = hang
    return run_worker(run_file)
