"""What the trainer needs to know of a model, found from the model itself and not from a list of names.

Everything here reads modules and parameters by their kind and place: a model that is built like those of the matrix
test (docs/models.md) works without a change. It reads shapes only, so it works on a model on the meta device too,
before the weights are loaded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_api.training import LoRA
from lora_trainer.errors import BadSpecError
from lora_trainer.experts import PackedExperts

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Entries of a config's ``layer_types`` that are attention; all others are recurrent layers."""

RECURRENT_KEYS = (
    "mamba_",
    "ssm_",
    "state_size",
    "time_step_",
    "lru_width",
    "linear_conv_",
    "conv_L_cache",
    "rescale_every",
)
"""Keys, or beginnings of keys, of a ``config.json`` that describe recurrent layers."""

LAYER_COUNTS, MAX_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000
"""Keys that say how many modules are built, and how many at the most: a wrong number would end the memory here."""


@dataclass(frozen=True)
class Architecture:
    """The parts of a decoder-only transformer, by the full names of its modules.

    ``linears`` are the linear layers of the decoder that an adapter may sit on. ``routers`` choose among experts, and
    ``experts`` are parameters that hold the weights of all experts of a layer: both stay as they are. ``others`` are
    linear layers outside the decoder, such as those of a vision encoder and the output head.
    """

    layer_classes: tuple[type[nn.Module], ...]
    linears: tuple[str, ...]
    routers: tuple[str, ...]
    experts: tuple[str, ...]
    others: tuple[str, ...]
    head: str | None

    @property
    def unquantized(self) -> list[str]:
        """Linear layers that are not quantized: routers are tiny and choose hard, the rest is not trained through."""
        return sorted({*self.routers, *self.others, *([self.head] if self.head else [])})


def read_architecture(model: PreTrainedModel) -> Architecture:
    """The parts of ``model``, which has no adapter yet.

    Raises:
        BadSpecError: it has no stack of equal layers with linear layers in them.
    """
    prefix, layers = find_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    head = names.get(id(model.get_output_embeddings()))
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    routers = set(_find_routers(model))
    packed = {id(p) for one in model.modules() if isinstance(one, PackedExperts) for p in one.parameters()}
    linears = [name for name in inside if name.startswith(f"{prefix}.") and name not in routers]
    if not linears:
        raise BadSpecError(
            f"baseModel: {type(model).__name__} has no linear layers (torch.nn.Linear) in its decoder layers, and "
            "those are what is quantized and adapted"
        )
    return Architecture(
        layer_classes=tuple(dict.fromkeys(type(layer) for layer in layers)),
        linears=tuple(linears),
        routers=tuple(name for name in inside if name in routers),
        experts=tuple(
            name
            for name, parameter in model.named_parameters()
            if name.startswith(f"{prefix}.") and (parameter.dim() == 3 or id(parameter) in packed) and "expert" in name
        ),
        others=tuple(name for name in inside if not name.startswith(f"{prefix}.") and name != head),
        head=head,
    )


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers and its full name: the list of modules with the most weights in the text decoder.

    Each entry becomes one group of FSDP, whose weights are gathered together. ``_no_split_modules`` of transformers is
    no help where it matters: it names classes of a vision encoder that the model does not have.

    Raises:
        BadSpecError: there is none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    best: nn.ModuleList | None = None
    most = 0
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and (size := sum(p.numel() for p in module.parameters())) > most:
            best, most = module, size
    if best is None:
        raise BadSpecError(f"baseModel: {type(inner).__name__} has no list of decoder layers to shard over GPUs")
    return next(name for name, module in model.named_modules() if module is best), best


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of ``model``, in order, with or without an adapter."""
    return list(find_layers(model)[1])


def _find_routers(model: nn.Module) -> Iterable[str]:
    """Linear layers that weigh experts: beside a module ``experts``, with at most one output for each of them."""
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        count = len(experts) if isinstance(experts, nn.ModuleList) else _leading_size(experts)
        for child, layer in module.named_children():
            if isinstance(layer, nn.Linear) and layer.out_features <= count:
                yield f"{name}.{child}"


def _leading_size(experts: nn.Module) -> int:
    if isinstance(experts, PackedExperts):
        return int(experts.num_experts)
    return max((parameter.shape[0] for parameter in experts.parameters() if parameter.dim() == 3), default=0)


def is_named(name: str, target: str) -> bool:
    """Whether ``target`` means the module ``name``: its last part, or its last parts."""
    return f".{name}".endswith(f".{target}")


def resolve_targets(architecture: Architecture, lora: LoRA) -> list[str]:
    """Entries of PEFT's ``target_modules`` that mean the layers of ``lora.targetModules`` and no others.

    Raises:
        BadSpecError: an entry of targetModules, rankPattern or alphaPattern is no layer that may get an adapter; the
            message says why.
    """
    if lora.target_modules == ["all-linear"]:
        chosen = set(architecture.linears)
    else:
        for target in lora.target_modules:
            if not any(is_named(name, target) for name in architecture.linears):
                raise BadSpecError(f"lora.targetModules: {_why_not(architecture, target)}")
        chosen = {name for name in architecture.linears if any(is_named(name, t) for t in lora.target_modules)}
    for field, pattern in (("rankPattern", lora.rank_pattern), ("alphaPattern", lora.alpha_pattern)):
        for target in pattern:
            if not any(is_named(name, target) for name in chosen):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in chosen}))
                raise BadSpecError(f"lora.{field}: {target} is none of the modules that get an adapter: {known}")
    return shorten(chosen, {*architecture.linears, *architecture.routers, *architecture.others} - chosen)


def _why_not(architecture: Architecture, target: str) -> str:
    known = ", ".join(sorted({name.rpartition(".")[2] for name in architecture.linears}))
    if any(is_named(name, target) for name in architecture.routers):
        return f"{target} is a router, which is never adapted; choose from {known}"
    if any(target in name.split(".") for name in architecture.experts):
        return f"{target} holds the weights of all experts in one parameter, which stays frozen; choose from {known}"
    if architecture.head is not None and is_named(architecture.head, target):
        return f"{target} is the output head, which is never adapted; choose from {known}"
    return f"{target} is no linear layer of the model's decoder; there are {known}"


def shorten(chosen: set[str], others: set[str]) -> list[str]:
    """``chosen`` by the last parts of their names where no other layer ends so, else by their full names. Sorted."""
    last = {name.rpartition(".")[2] for name in chosen}
    if any(name.rpartition(".")[2] in last for name in others):
        return sorted(chosen)
    return sorted(last)


def choose_attention(
    *, flash: bool, sdpa: bool, capability: tuple[int, int] | None, half: bool, present: Sequence[str]
) -> str:
    """The attention implementation: FlashAttention where it can run, then PyTorch's SDPA, then eager.

    ``flash`` and ``sdpa`` say what the model's class can do: softcapping (Gemma 2) and attention sinks are beyond
    SDPA. ``capability`` is the GPU's, ``None`` on a CPU. FlashAttention 2 needs Ampere (8.0), 3 needs Hopper (9.0),
    and both need a 16-bit type (``half``). ``present`` are those that are installed.
    """
    if flash and half and capability is not None:
        if capability[0] == 9 and "flash_attention_3" in present:
            return "flash_attention_3"
        if capability[0] >= 8 and "flash_attention_2" in present:
            return "flash_attention_2"
    return "sdpa" if sdpa else "eager"


def attention_implementation(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """``choose_attention`` for this model and machine."""
    on_gpu = device.type == "cuda"
    return choose_attention(
        flash=bool(model._supports_flash_attn),  # noqa: SLF001 - transformers has no public name for it
        sdpa=bool(model._supports_sdpa),  # noqa: SLF001
        capability=torch.cuda.get_device_capability(device) if on_gpu else None,
        half=dtype in (torch.bfloat16, torch.float16),
        present=installed_flash_attention() if on_gpu else (),
    )


def installed_flash_attention() -> list[str]:
    """FlashAttention versions whose packages are in the image.

    Kernels of the hub, which transformers can use in their place, are machine code of others: none is fetched, and none
    is taken from the hub's cache, which a run can fill.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    checks = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    return [name for name, check in checks.items() if check()]


def check_supported(config: Mapping[str, Any]) -> None:
    """Says what of a model's ``config.json`` rules it out. No weights are read.

    Raises:
        BadSpecError: this trainer cannot train it; the message says why.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    if config.get("quantization_config") is not None:
        raise BadSpecError(
            "config.json: quantization_config: the weights are quantized already; use the original model, which "
            "quantization.type quantizes while it is loaded"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        own = " It brings its own code (auto_map), which is never run." if config.get("auto_map") else ""
        raise BadSpecError(
            f"config.json: model_type is {kind!r}, which this version of transformers does not know.{own}"
        )
    text = config.get("text_config")
    for numbers in (config, text if isinstance(text, Mapping) else {}):
        if numbers.get("is_encoder_decoder") is True:
            raise BadSpecError(f"config.json: is_encoder_decoder: {kind} has an encoder; only decoders are trained")
        recurrent = [key for key, value in numbers.items() if value is not None and key.startswith(RECURRENT_KEYS)]
        kinds = numbers.get("layer_types")
        others = set(map(str, kinds if isinstance(kinds, list) else ())) - ATTENTION_KINDS
        for key in LAYER_COUNTS:
            if isinstance(count := numbers.get(key), int) and count > MAX_LAYERS:
                raise BadSpecError(f"config.json: {key} is {str(count)[:40]}; no model has more than {MAX_LAYERS}")
        if recurrent or others:
            raise BadSpecError(
                f"config.json: {min(recurrent or ['layer_types'])}: {kind} has recurrent (state-space) layers, whose "
                "kernels read the weights of linear layers past an adapter; only attention layers are trained"
            )
    encoders = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() | MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
    if kind in encoders:
        raise BadSpecError(f"config.json: model_type is {kind!r}, which has an encoder; only decoders are trained")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BadSpecError(f"config.json: model_type is {kind!r}, which is no causal language model in transformers")
