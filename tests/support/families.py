"""Tiny random models of the families that people fine-tune, each from its own config class, with a tokenizer."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.tiny import save_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TEXT = {**SIZES, "head_dim": 16, "sliding_window": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES = {"image_size": 28, "patch_size": 14}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-3": ("Llama", {"tie_word_embeddings": False, "rope_theta": 500000.0}),
    "llama-3-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma-2": ("Gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma-3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma-3-vision": ("Gemma3", {"text_config": _TEXT, "vision_config": {**_VISION, **_IMAGES}}),
    "qwen-2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen-3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen-3-moe": ("Qwen3Moe", {"head_dim": 16, **_MOE}),
    "qwen-2-moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 32}),
    "phi-2": ("Phi", {}),
    "phi-3": ("Phi3", {}),
    "phi-3.5-moe": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm-2": (
        "Llama",
        {"tie_word_embeddings": True, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "smollm-3": ("SmolLM3", {"tie_word_embeddings": True, "no_rope_layer_interval": 2}),
}
"""By the name that people use: the prefix of transformers' config class, and what differs from ``SIZES``."""


def build_config(family: str) -> Any:
    """The config of a tiny model of ``family``."""
    import transformers

    kind, changes = FAMILIES[family]
    sizes = {} if "text_config" in changes else SIZES
    return getattr(transformers, f"{kind}Config")(**{**sizes, **changes})


def make_family(family: str, directory: Path) -> Path:
    """Writes a random model of ``family`` as a Hugging Face directory with a tokenizer.

    Norms and biases are random too, so that leaving one out shows in the logits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "router" in name or "gate.weight" in name:
                parameter.normal_()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def describe_family(family: str) -> tuple[str, ...]:
    """A row of the table in docs/models.md: what the trainer finds in the model, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_trainer.architecture import attention_implementation, read_architecture

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(family))
    found = read_architecture(model)
    frozen = sorted({".".join(name.split(".")[-2:]) for name in (*found.routers, *found.experts)})
    return (
        family,
        model.config.model_type,
        ", ".join(kind.__name__ for kind in found.layer_classes),
        ", ".join(dict.fromkeys(_kind(name) for name in found.linears)),
        ", ".join(frozen) or "-",
        attention_implementation(model, torch.device("cpu"), torch.float32),
    )


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def build_table() -> list[str]:
    """The table of docs/models.md, line by line. ``python -m tests.support.families`` prints it."""
    head = ("family", "`model_type`", "one FSDP group", "gets an adapter", "stays frozen", "attention without flash")
    rows = [head, ("---",) * len(head), *map(describe_family, FAMILIES)]
    return ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    sys.stdout.write("\n".join(build_table()) + "\n")
