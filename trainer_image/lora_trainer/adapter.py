"""The trained adapter as files that PEFT and vLLM load as they are."""

import json
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save

from lora_api.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_api.run import RunSpec
from lora_api.training import LoRA
from lora_trainer.errors import InternalError
from lora_trainer.parallel import full_tensor
from lora_trainer.rows import find_rows, row_tensors
from lora_trainer.store import split_uri

ROUNDING = 1e-12
"""Scales that differ by no more are equal: less than float32 can tell (6e-8)."""

ADAPTER = "default"
"""PEFT's name of the adapter that is trained."""


def gather_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """The whole adapter on the CPU, by PEFT's names. All ranks call it.

    Raises:
        InternalError: it is not a complete, finite, trained adapter.
    """
    tensors = {
        name.replace(f".{ADAPTER}.", "."): full_tensor(parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    check_adapter(tensors, matrix_shapes(model))
    learned = find_rows(model)
    return tensors if learned is None else tensors | row_tensors(learned)


def expected_shapes(model: PeftModel) -> dict[str, tuple[int, int]]:
    """Shape of each matrix that is published, those of new tokens' rows included."""
    learned = find_rows(model)
    return matrix_shapes(model) | ({} if learned is None else learned.shapes)


def matrix_shapes(model: PeftModel) -> dict[str, tuple[int, int]]:
    """Shape of each matrix that the adapter must have: A (rank, inputs) and B (outputs, rank) for each module."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            rank = int(module.r[ADAPTER])
            shapes[f"{name}.lora_A.weight"] = (rank, int(module.in_features))
            shapes[f"{name}.lora_B.weight"] = (int(module.out_features), rank)
    return shapes


def check_adapter(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]]) -> None:
    """Raises InternalError unless ``tensors`` is an adapter worth publishing.

    Each of these has been published by some trainer without a word: an empty file, the slice of one rank, values that
    are not finite, and an adapter that was never trained.
    """
    if not shapes or set(tensors) != set(shapes):
        missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise InternalError(f"the adapter has not the right weights: missing {missing[:3]}, not expected {extra[:3]}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise InternalError(f"the adapter's {name} has shape {tuple(tensor.shape)} instead of {shapes[name]}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise InternalError(f"the adapter's {name} has values that are not finite numbers")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name):
        raise InternalError("every B matrix of the adapter is zero: training changed nothing")


def model_name(uri: str) -> str:
    """The base model as others know it: the hub's name without hf://, or the URI as the user gave it."""
    scheme, rest = split_uri(uri)
    return rest if scheme == "hf" else uri


def module_scales(model: PeftModel) -> dict[str, tuple[int, float]]:
    """Rank and scale (alpha / r, or alpha / sqrt(r) with rsLoRA) of each adapted module, by its full name."""
    scales = {
        name: (int(module.r[ADAPTER]), float(module.scaling[ADAPTER]))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }
    learned = find_rows(model)
    if learned is not None:
        scales |= dict.fromkeys((learned.embedding_name, learned.head_name), (len(learned.ids), 1.0))
    return scales


def unify(
    tensors: dict[str, torch.Tensor], scales: dict[str, tuple[int, float]], rank: int, scale: float
) -> dict[str, torch.Tensor]:
    """The same adapter with one rank and one scale for all modules, as vLLM loads it.

    A (r, inputs) is filled up with zero rows and B (outputs, r) with zero columns to ``rank``, which adds nothing to
    B A; the ratio of the module's scale to ``scale`` goes into B. A module that fits already, but for the rounding of
    alpha * sqrt(r) / r, keeps its exact values.
    """
    unified = dict(tensors)
    for name, (own_rank, own_scale) in scales.items():
        a, b = matrix_names(name, tensors)
        if not math.isclose(own_scale, scale, rel_tol=ROUNDING):
            unified[b] = tensors[b].to(torch.float32) * (own_scale / scale)
        if own_rank < rank:
            unified[a] = torch.nn.functional.pad(unified[a], (0, 0, 0, rank - own_rank))
            unified[b] = torch.nn.functional.pad(unified[b], (0, rank - own_rank))
    return unified


def matrix_names(module: str, tensors: Container[str]) -> tuple[str, str]:
    """PEFT's names of A and B of ``module``; those of an embedding differ."""
    if f"{module}.lora_embedding_A" in tensors:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def published_alpha(lora: LoRA) -> float:
    """``lora_alpha`` for readers that scale by alpha / r alone: with rsLoRA alpha * sqrt(r), whose scale is the same.

    All of PEFT, vLLM (``PEFTHelper``) and SGLang (``LoRAAdapter``) divide it as a number, and take one with a fraction.
    """
    return lora.alpha * math.sqrt(lora.published_rank) if lora.use_rslora else lora.alpha


def write_adapter(tensors: dict[str, torch.Tensor], model: PeftModel, run: RunSpec, directory: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors. Equal weights give equal bytes.

    Rank and alpha patterns are in neither: vLLM reads one rank and one alpha. Nor is rsLoRA: SGLang does not read
    use_rslora.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config[ADAPTER].to_dict().items()
    }
    scales = module_scales(model)
    rank, alpha = run.lora.published_rank, published_alpha(run.lora)
    tensors = unify(tensors, scales, rank, alpha / rank)
    config.update(r=rank, lora_alpha=alpha, use_rslora=False, rank_pattern={}, alpha_pattern={})
    config["inference_mode"] = True
    config["base_model_name_or_path"] = model_name(run.base_model.uri)
    config["revision"] = run.base_model.revision
    learned = find_rows(model)
    names = [] if learned is None else [learned.embedding_name, learned.head_name]
    config["target_modules"] = sorted([*config["target_modules"], *(name.rpartition(".")[2] for name in names)])
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    ordered = {name: tensors[name].to(torch.float32).contiguous() for name in sorted(tensors)}
    (directory / ADAPTER_WEIGHTS).write_bytes(save(ordered, metadata={"format": "pt"}))
