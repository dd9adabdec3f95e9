"""Models from published configurations with random weights, made layer by layer: no checkpoint, no large peak."""

import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from lora_api.training import Quantization
from lora_trainer.architecture import attention_implementation, read_architecture
from lora_trainer.loading import LOADED_FLAG
from lora_trainer.model import compute_dtype, load_skeleton, make_base, quantization_config

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "llama-3-8b, 8 layers": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 8},
    "llama-3-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "small": _LLAMA_3
    | {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 4}
    | {"vocab_size": 4096},
    "tiny": _LLAMA_3
    | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    | {"num_key_value_heads": 2, "vocab_size": 512},
}
"""Llama 3 (Meta, arXiv:2407.21783, table 3): 8B and 70B; the numbers are those of the published config.json. ``small``
is for parity on a GPU, ``tiny`` for trials on a CPU. 8 of the 32 layers of 8B are for the comparison of levers, which
has many rows and little time."""

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon", "tree", "stone")
INITIAL_RANGE = 0.02
SEED = 1234


def write_model(directory: Path, name: str) -> Path:
    """A model directory as the trainer expects it, without weights: ``random_base_model`` makes them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(WORDS)], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(directory)  # noqa: SLF001
    save_file({}, directory / "model.safetensors")
    return directory


def write_records(path: Path, count: int, tokens: int) -> Path:
    """``count`` texts of at least ``tokens`` tokens each: a word is one token or more."""
    generator = torch.Generator().manual_seed(SEED)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            numbers = torch.randint(len(WORDS), (tokens,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(WORDS[number] for number in numbers)}) + "\n")
    return path


def random_base_model(
    directory: Path,
    quantization: Quantization,
    device: torch.device,
    attention: str | None = None,
) -> PreTrainedModel:
    """In place of ``load_base_model``: the same modules, types and places, with random weights.

    ``attention`` is the implementation, such as ``sdpa``; by default the trainer's choice.

    Each weight is made in the compute type on the device and quantized at once, so that the peak is the quantized
    model and one weight. All ranks make the same values.
    """
    dtype = compute_dtype(quantization, device)
    skeleton = load_skeleton(directory)
    settings = quantization_config(quantization, dtype, read_architecture(skeleton))
    config = AutoConfig.from_pretrained(directory)
    chosen = attention or attention_implementation(skeleton, device, dtype)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=chosen)
    if settings is not None:
        replace_with_bnb_linear(model, ["lm_head"], settings)
        _mark_quantized(model, settings)
    generator = torch.Generator(device).manual_seed(SEED)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = _materialize(module, name, parameter, dtype, generator)
            setattr(made, LOADED_FLAG, True)  # as if it came from a file: each rank keeps its part
            module.register_parameter(name, made)
        if list(module.buffers(recurse=False)):
            _remake_buffers(module, config, device)
    model.tie_weights()
    model.eval()
    return make_base(model)


def _materialize(
    module: nn.Module, name: str, parameter: nn.Parameter, dtype: torch.dtype, generator: torch.Generator
) -> nn.Parameter:
    device = generator.device
    if isinstance(module, Linear4bit) and name == "weight":
        shape = (module.out_features, module.in_features)
        values = torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(INITIAL_RANGE)
        packed = Params4bit(
            values,
            requires_grad=False,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
            module=module,
        )
        return packed.to(device)
    if parameter.dim() < 2:  # a norm's weight
        return nn.Parameter(torch.ones(parameter.shape, dtype=dtype, device=device), requires_grad=False)
    values = torch.randn(parameter.shape, dtype=dtype, device=device, generator=generator).mul_(INITIAL_RANGE)
    return nn.Parameter(values, requires_grad=False)


def _remake_buffers(module: nn.Module, config: Any, device: torch.device) -> None:
    """Rotary frequencies are computed from the configuration, not loaded."""
    with device:
        fresh = type(module)(config=config)
    for name, buffer in fresh.named_buffers(recurse=False):
        module.register_buffer(name, buffer, persistent=False)


def _mark_quantized(model: PreTrainedModel, settings: Any) -> None:
    """What from_pretrained leaves on a quantized model; PEFT and transformers' Trainer read it."""
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
