"""Attention over packed rows without a mask, by PyTorch's own kernel (``torch.nn.attention.varlen``), on GPUs.

A mask for rows of many documents is S x S, and every kernel that takes one computes all of it: at S = 8192 that is 40 %
of the FLOPs of an 8B model's linear layers. FlashAttention takes the borders of the documents in its place, and PyTorch
has a copy of it for that (2.13: no package, no Triton). It comes in behind transformers' AttentionInterface, so a model
calls it as it calls FlashAttention. What has no borders, evaluation and answers, goes to SDPA as before.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_trainer.architecture import decoder_layers
from lora_trainer.errors import InternalError

VARLEN = "varlen_attn"
"""Its name among transformers' attention implementations."""

WINDOWED_KINDS = {"full_attention", "sliding_attention"}
"""Entries of a config's ``layer_types`` that the kernel has an argument for."""

BIG_CHIPS = {(8, 0), (9, 0), (10, 0)}
"""A100, H100 and H200, B200: those with the shared memory that gradients of wide heads take."""


@dataclass(frozen=True)
class AttentionNeeds:
    """What the decoder of a model asks of its attention.

    Attributes:
        dispatched: it goes through transformers' AttentionInterface, to SDPA or to FlashAttention. Those that can use
            FlashAttention give windows as an argument; others may have them in the mask alone.
        head_sizes: of queries and keys, in all layers.
        even: values have the size of keys.
        softcap: attention scores are squashed (Gemma 2).
        dropout: a share of the attention weights is left out in training.
        causal: no token sees a later one.
        kinds: entries of ``layer_types``, where the model has some.
    """

    dispatched: bool = True
    head_sizes: frozenset[int] = frozenset({128})
    even: bool = True
    softcap: bool = False
    dropout: bool = False
    causal: bool = True
    kinds: frozenset[str] = frozenset()


def read_needs(model: PreTrainedModel) -> AttentionNeeds:
    """What ``model`` needs, from its attention modules: those in the decoder that have a head size."""
    modules = [module for layer in decoder_layers(model) for module in layer.modules() if hasattr(module, "head_dim")]
    kind = type(model)
    return AttentionNeeds(
        dispatched=bool(kind._supports_flash_attn and kind._supports_sdpa and kind._can_set_attn_implementation()),  # noqa: SLF001 - transformers has no public names for them
        head_sizes=frozenset(int(module.head_dim) for module in modules),
        even=all(getattr(module, "v_head_dim", None) in (None, module.head_dim) for module in modules),
        softcap=any(getattr(module, "attn_logit_softcapping", None) is not None for module in modules),
        dropout=any(getattr(module, "attention_dropout", 0.0) for module in modules),
        causal=all(getattr(module, "is_causal", True) for module in modules),
        kinds=frozenset(getattr(model.config.get_text_config(), "layer_types", None) or ()),
    )


def why_dense(needs: AttentionNeeds, capability: tuple[int, int], *, half: bool) -> str | None:
    """Why packed rows need a mask on a GPU of ``capability``, as words; ``None``: the kernel can do without.

    ``half``: products are in a 16-bit type. The limits are those of FlashAttention 2 in torch 2.13
    (aten/native/transformers/cuda/flash_attn, sdp_utils.cpp): Ampere or newer, 16 bits, head sizes in multiples of 8 up
    to 256; gradients for more than 192 on some chips alone (BIG_CHIPS).
    """
    most = 256 if capability in BIG_CHIPS else 192
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, and the kernel needs 8.0"
    if not half:
        return "products are in float32, and the kernel needs 16 bits (quantization.computeDtype)"
    if needs.softcap:
        return "the model squashes its attention scores (attn_logit_softcapping)"
    if not needs.dispatched or not needs.head_sizes:
        return "the model's attention cannot be exchanged in transformers"
    if needs.dropout:
        return "the model leaves out attention weights (attention_dropout)"
    if not needs.causal:
        return "the model's attention is not causal"
    if others := needs.kinds - WINDOWED_KINDS:
        return f"the model has layers of {', '.join(sorted(others))}"
    if not needs.even:
        return "the model's keys and values differ in size"
    if wrong := sorted(size for size in needs.head_sizes if size % 8 or size > most):
        return f"the model's head size is {wrong[-1]}, and this GPU's kernel takes multiples of 8 up to {most}"
    return None


def settle_packing(model: PreTrainedModel, capability: tuple[int, int] | None, *, half: bool, say: bool) -> None:
    """Lets ``model`` attend to packed rows without a mask where it can. Where not, ``say`` why in the log.

    FlashAttention stays where it is installed. ``capability`` is the GPU's, ``None`` on a CPU, which has no kernel.
    """
    if capability is None or "flash" in str(model.config._attn_implementation):  # noqa: SLF001
        return
    reason = why_dense(read_needs(model), capability, half=half)
    if reason is None:
        use_varlen(model)
    elif say:
        sys.stderr.write(
            f"dataset.packing: attention takes a mask of the whole row, because {reason}; long rows take more time\n"
        )


def use_varlen(model: PreTrainedModel) -> None:
    """Takes the kernel for every call that says where documents begin (``packs.flash_arguments``)."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, varlen_mask)
    model.set_attn_implementation(VARLEN)


def varlen_mask(**arguments: Any) -> torch.Tensor | None:
    """SDPA's mask, or for a row of many documents one without elements: no mask would mean "causal" to SDPA.

    transformers sees such a row by its positions, and then wants a mask even where causal ones are skipped.
    """
    packed = arguments.get("attention_mask") is None and not arguments.get("allow_is_causal_skip", True)
    if packed and arguments["q_length"] == arguments["kv_length"] > 1:
        return torch.empty(0, 0, 0, 0, dtype=torch.bool)
    mask: torch.Tensor | None = sdpa_mask(**arguments)
    return mask


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: (1, heads, tokens, head size) to (1, tokens, heads, head size).

    A window of w lets a token see itself and the w - 1 before it, as in transformers' masks.

    Raises:
        InternalError: the model asks for what ``why_dense`` should have ruled out, or does not say where documents
            begin.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        if attention_mask is not None and not attention_mask.numel():
            raise InternalError("a row without a mask does not say where its documents begin")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    asked = {"dropout": dropout or None, **{name: rest.get(name) for name in ("softcap", "s_aux", "position_bias")}}
    if found := [name for name, asked_for in asked.items() if asked_for is not None]:
        raise InternalError(f"{type(module).__name__} asks for {', '.join(found)}, which varlen_attn does not have")
    device = query.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (one[0].transpose(0, 1).to(low) for one in (query, key, value))
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)  # noqa: S101 - for the type checker
    return output[None], None
