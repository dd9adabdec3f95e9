"""Frozen weights that are held as integers: where they are, what they are unpacked with, and int8 layers in shards.

No step of their way passes a byte through a floating-point type: a copy of bfloat16 on CUDA (``torch._foreach_copy_``,
with which FSDP2 gathers) makes 0x7FFF of every pattern that is not a number, which packed bytes have now and then
(decision 036). As integers they are sharded and gathered byte by byte (torch 2.13).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from torch import nn
from torch.distributed.tensor import DTensor

from lora_trainer.loading import local_part


class FrozenInt8(Linear8bitLt):
    """A layer of LLM.int8() that keeps no weight but the one that is registered, so that FSDP2 can shard that.

    bitsandbytes' own keeps it a second time in its state, and writes it back after each use.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As bitsandbytes computes it (0.50), on the weight that is gathered now."""
        self.state.is_training = self.training
        self.state.CB = self.weight.data
        bias = None if self.bias is None else self.bias.to(x.dtype)
        found: torch.Tensor = bnb.matmul(x, self.weight, bias=bias, state=self.state)
        return found


@dataclass(frozen=True)
class Packed:
    """A weight that is held as integers: ``attribute`` of ``module``, which had the ``name`` when it was loaded."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> torch.Tensor:
        """What is registered now: the whole weight, a shard of it (DTensor), or what stands for it while loading."""
        found: torch.Tensor = getattr(self.module, self.attribute)
        return found

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here: it was never sharded, or it is gathered."""
        return not isinstance(self.parameter, DTensor)

    @property
    def here(self) -> torch.Tensor:
        """The bytes of it that this process holds."""
        parameter = self.parameter
        if isinstance(parameter, DTensor):
            return parameter.to_local()
        part = local_part(parameter)
        return parameter.data if part is None else part

    @property
    def constants(self) -> list[torch.Tensor]:
        """What the products unpack it with, whole on each process."""
        if isinstance(self.module, Linear8bitLt):
            return [self.module.state.SCB]
        return _tensors(self.module.quant_state)


def find_packed(model: nn.Module) -> list[Packed]:
    """The weights of ``model`` that are held as integers, in order."""
    return list(_find(model))


def _find(model: nn.Module) -> Iterator[Packed]:
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            yield Packed(name, module, "weight")


def _tensors(state: QuantState) -> list[torch.Tensor]:
    """Scales and table of NF4, with those of the scales themselves where they are quantized too."""
    inner = _tensors(state.state2) if state.state2 is not None else []
    own = [state.absmax, state.code, state.offset]
    return [tensor for tensor in own if tensor is not None] + inner


def freeze_int8(model: nn.Module) -> None:
    """Makes ``FrozenInt8`` of the int8 layers of a model that was just loaded."""
    for module in model.modules():
        if type(module) is Linear8bitLt and isinstance(module.weight, Int8Params):
            module.state.SCB = module.weight.SCB
            module.weight.CB = module.weight.SCB = None
            module.__class__ = FrozenInt8
