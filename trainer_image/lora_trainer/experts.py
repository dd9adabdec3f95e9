"""Routed experts in NF4: those of a layer are packed together as they are loaded, and unpacked one at a time.

transformers 5 keeps them in two parameters of three dimensions (``gate_up_proj`` and ``down_proj``: experts, outputs,
inputs), which bitsandbytes does not quantize. Here each is packed as one long row of blocks when it is loaded: a
parameter of bytes, which is cut and sharded evenly whatever the number of experts, and a state of constants. A forward
pass sorts the tokens by expert and multiplies those of each chosen expert with bitsandbytes' own product of NF4, on
that expert's slice of bytes and constants. Its backward pass unpacks the slice again: the weights are frozen, so the
gradient of the input is all there is. No expert that no token chose is unpacked.

transformers' own implementations (``experts_implementation``) take the whole parameter in the compute type
(``grouped_mm``) or a copy of an expert for each token (``batched_mm``), and its generation switches from one to the
other. So the module's class is changed, and its ``forward`` with it, and not an entry of a registry.
"""

from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit
from torch import nn

from lora_api.training import Quantization
from lora_trainer.errors import BadSpecError

NAMES = ("gate_up_proj", "down_proj")
BLOCK = 64
"""Weights that share a scale (QLoRA, arXiv:2305.14314). Those of one expert fill whole blocks."""


class PackedExperts(nn.Module):
    """Mix-in before a class of transformers with experts; made by ``pack_parameter``."""

    packed_states: dict[str, QuantState]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of what the chosen experts answer.

        Shapes: ``hidden_states`` (tokens, hidden size), ``top_k_index`` and ``top_k_weights`` (tokens, chosen); returns
        (tokens, hidden size) in the type of ``hidden_states``.
        """
        tokens, chosen = top_k_index.shape
        numbers = top_k_index.reshape(-1)
        order = torch.argsort(numbers, stable=True)
        counts: list[int] = torch.bincount(numbers, minlength=int(self.num_experts)).tolist()
        up, down = (_Slices.of(self, name) for name in NAMES)
        found = []
        for expert, some in enumerate(hidden_states[order // chosen].split(counts)):
            if len(some):
                inner = self._apply_gate(up.multiply(some.to(up.state.dtype), expert))
                found.append(down.multiply(inner, expert))
        weighted = torch.cat(found) * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)


@dataclass(frozen=True)
class _Slices:
    """One packed parameter, as matrices of single experts. ``absmax`` has all scales, unpacked themselves."""

    data: torch.Tensor
    absmax: torch.Tensor
    state: QuantState

    @classmethod
    def of(cls, module: PackedExperts, name: str) -> "_Slices":
        """What ``module`` holds as ``name`` now, gathered."""
        state = module.packed_states[name]
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        return cls(getattr(module, name).data, absmax.float(), state)

    def multiply(self, values: torch.Tensor, expert: int) -> torch.Tensor:
        """``values`` (tokens, inputs) times the matrix of ``expert``: (tokens, outputs)."""
        _, outputs, inputs = self.state.shape
        size = outputs * inputs
        own = QuantState(
            absmax=self.absmax[expert * size // BLOCK : (expert + 1) * size // BLOCK],
            shape=torch.Size((outputs, inputs)),
            code=self.state.code,
            blocksize=BLOCK,
            quant_type=self.state.quant_type,
            dtype=self.state.dtype,
        )
        product: torch.Tensor = bnb.matmul_4bit(
            values, self.data[expert * size // 2 : (expert + 1) * size // 2], quant_state=own
        )
        return product


def can_pack(module: nn.Module) -> bool:
    """Whether ``module`` holds experts as this page describes them: gated, without biases, outputs before inputs."""
    return (
        getattr(module, "has_gate", False)
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and all(isinstance(getattr(module, name, None), nn.Parameter) for name in NAMES)
    )


def pack_parameter(
    module: nn.Module, name: str, parameter: nn.Parameter, quantization: Quantization
) -> nn.Parameter | None:
    """``parameter``, which ``module`` is about to get as ``name``, in NF4; ``None`` where it is no experts' weight.

    Raises:
        BadSpecError: the weights of one expert do not fill whole blocks.
    """
    if quantization.type != "nf4" or name not in NAMES or parameter.dim() != 3 or not parameter.is_floating_point():
        return None
    if not isinstance(module, PackedExperts):
        if not can_pack(module):
            return None
        kind = type(module)
        module.__class__ = type(f"Packed{kind.__name__}", (PackedExperts, kind), {})
        module.packed_states = {}
    if parameter[0].numel() % BLOCK:
        raise BadSpecError(
            f"quantization.type nf4: an expert's {name} of {parameter[0].numel():,} weights does not fill blocks of "
            f"{BLOCK}; set quantization.type: none"
        )
    data, state = quantize_4bit(
        parameter.data.contiguous(),
        blocksize=BLOCK,
        compress_statistics=quantization.double_quant,
        quant_type="nf4",
        quant_storage=torch.uint8,
    )
    module.packed_states[name] = state
    return nn.Parameter(data, requires_grad=False)
