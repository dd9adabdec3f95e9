"""Loading a model that no device could hold whole: of each weight a process keeps its own part alone.

transformers loads one weight after the other, quantizes it on the device, and hands it to its module. There the weight
is cut: this process's part is kept, and a stand-in of the same type, shape and device takes the weight's place, whose
memory is that of one value. What comes between loading and sharding (PEFT, TRL) looks at shapes and types alone. So the
peak while loading is this process's parts and one whole weight, with the same bits as if the model had been loaded
whole: quantization has seen each weight whole. Packed weights are integers, and are cut as they are.

FSDP2's own way, a model on the meta device whose shards are loaded (transformers' ``distributed_config``), quantizes
shards of weights that bitsandbytes has not packed yet: it is not for NF4 (transformers 5.23).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers.modeling_utils
from bitsandbytes.nn import Int8Params, Params4bit
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lora_trainer.strategy import Strategy

ASYNC_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' variable that turns off loading by threads, which run ahead of the cutting."""

LOADED_FLAG = "_is_hf_initialized"
"""What transformers sets on a weight that came from the files. Others are still to be filled and stay whole."""


@dataclass(frozen=True)
class Part:
    """The ``index``-th of ``shards`` parts along the first dimension; ``on_host`` keeps it in host memory."""

    shards: int
    index: int
    on_host: bool = False

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A copy of this part of ``whole``, cut as FSDP2 cuts: equal parts, the last ones smaller or empty."""
        chunks = torch.chunk(whole, self.shards)
        cut = chunks[self.index] if self.index < len(chunks) else whole[:0]
        return cut.to("cpu", copy=True) if self.on_host else cut.clone(memory_format=torch.contiguous_format)

    def first(self, rows: int) -> int:
        """Number of the first row of this part, of a weight with so many ``rows``."""
        return self.index * -(-rows // self.shards)


def part_to_load(strategy: Strategy, rank: int) -> Part | None:
    """What the process ``rank`` keeps of each weight while loading; ``None``: all of it, on its device."""
    return Part(strategy.shards, strategy.part(rank), strategy.offload) if strategy.is_sharded else None


def local_part(parameter: nn.Parameter) -> torch.Tensor | None:
    """The part that a stand-in stands for; ``None`` for any other parameter."""
    part: torch.Tensor | None = getattr(parameter, "local_part", None)
    return part


@contextmanager
def keeping(part: Part | None) -> Iterator[None]:
    """Weights that are loaded inside are cut down to ``part``. ``None`` changes nothing."""
    if part is None:
        yield
        return

    def cut(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or not getattr(parameter, LOADED_FLAG, False):
            return None
        if local_part(parameter) is not None:
            return None
        return _stand_in(parameter, part)

    before = os.environ.get(ASYNC_SWITCH)
    os.environ[ASYNC_SWITCH] = "1"
    warm_up = transformers.modeling_utils.caching_allocator_warmup
    transformers.modeling_utils.caching_allocator_warmup = _reserve_nothing
    handle = register_module_parameter_registration_hook(cut)
    try:
        yield
    finally:
        handle.remove()
        transformers.modeling_utils.caching_allocator_warmup = warm_up
        if before is None:
            del os.environ[ASYNC_SWITCH]
        else:
            os.environ[ASYNC_SWITCH] = before


def _reserve_nothing(*_: object) -> None:
    """In place of transformers' reservation of the whole model's memory on the device, before it loads."""


def _stand_in(parameter: nn.Parameter, part: Part) -> nn.Parameter:
    """A parameter that looks like ``parameter`` and has the memory of one value; its ``local_part`` is the real one."""
    data = parameter.data
    likeness = torch.empty((), dtype=data.dtype, device=data.device).expand(data.shape)
    kind = type(parameter) if isinstance(parameter, Params4bit | Int8Params) else nn.Parameter
    stand_in: nn.Parameter = kind(likeness, requires_grad=False)
    stand_in.__dict__.update(parameter.__dict__)  # bitsandbytes' quantization state, and transformers' flag
    if isinstance(stand_in, Int8Params):
        stand_in.CB = None  # the whole weight once more
    stand_in.local_part = part.of(data)  # type: ignore[attr-defined]
    return stand_in
