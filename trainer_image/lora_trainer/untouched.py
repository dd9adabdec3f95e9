"""accelerate never prepares a model of ours: it gets the optimizer and the batches.

On a gang of GPUs it would wrap the model in DistributedDataParallel, which cannot hold shards, and would average once
more what ``sharding.average_gradients`` averages. Which kind of gang it sees cannot be told it for long:
``AcceleratorState()`` copies the process's own state back wherever it is called (accelerate/state.py:919, also in
``prepare_model`` itself, utils/modeling.py:2086). So it is not asked to prepare anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_trainer.errors import InternalError

MARK = "_is_accelerate_prepared"
"""accelerate gives a model that has it back as it is, before it does anything else (accelerator.py:1806)."""


@contextmanager
def kept_from_accelerate(model: nn.Module) -> Iterator[None]:
    """Inside it, accelerate may be asked to prepare ``model``, and must not change it.

    Raises:
        InternalError: at the end, where a module of it is another one or has another forward method.
    """
    setattr(model, MARK, True)
    before = _modules(model)
    yield
    if _modules(model) != before:
        raise InternalError(
            "a library has wrapped the model or changed its forward pass, which only the trainer may: is another "
            "version of accelerate or transformers installed than it was made for?"
        )


def check_same_model(prepared: object, model: nn.Module) -> None:
    """Raises InternalError unless what the training loop was given is ``model`` itself."""
    if prepared is not model:
        raise InternalError(
            f"the model was wrapped in {type(prepared).__name__}, and the trainer shards it and averages its gradients "
            "itself: is another version of accelerate or transformers installed than it was made for?"
        )


def _modules(model: nn.Module) -> list[tuple[str, int, type, Any]]:
    """Every module, by name, and the forward method that was put on it."""
    return [(name, id(module), type(module), vars(module).get("forward")) for name, module in model.named_modules()]
