"""One place for mixed precision: the model's own forward method is under autocast, so every caller's pass is.

The base and its products are in bfloat16 on GPUs, the adapter in float32 (docs/decisions/035). A pass under autocast
rounds otherwise than one without. So the training step, the evaluations before, between and after, the answers, the
proof that packed documents are apart and the reference of preferences all have to run under the same one, and none of
them can get another: they only call the model.
"""

import functools
import types
from typing import Any

import torch
from transformers import PreTrainedModel


def autocast_forward(model: PreTrainedModel, products: torch.dtype, device: torch.device) -> None:
    """Lets ``model`` compute under autocast to ``products`` from now on; in float32 it needs none.

    What else changes its forward method comes before, so that it is under autocast too. Recomputed layers are as well:
    torch.utils.checkpoint keeps the state of autocast.
    """
    if products == torch.float32:
        return
    inner = model.forward

    @functools.wraps(inner)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype=products):
            return inner(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
