"""What the memory plan reads from a config.json: each family, and what is refused."""

from typing import Any

import pytest

from lora_api.training import Quantization
from lora_trainer.errors import BadSpecError
from lora_trainer.memory import GIB, adapter_weights, plan_memory
from lora_trainer.modelshape import UnplannedModelError, read_shape
from tests.unit.trainer.configs import (
    GEMMA_2_9B,
    GEMMA_3_4B,
    MIXTRAL,
    PHI_3_MINI,
    QWEN_3_8B,
    QWEN_3_30B_A3B,
    QWEN_15_MOE,
    QWEN_25_7B,
    SMOL_3_3B,
    SMOL_135M,
    job,
)
from tests.unit.trainer.published import LLAMA_2_70B, LLAMA_3_8B, MISTRAL_7B

MODELS = [
    ("Mistral-7B", MISTRAL_7B, 7.24e9),
    ("Llama-2-70B", LLAMA_2_70B, 68.98e9),
    ("Llama-3-8B", LLAMA_3_8B, 8.03e9),
    ("Qwen3-8B", QWEN_3_8B, 8.19e9),
    ("Qwen2.5-7B", QWEN_25_7B, 7.62e9),
    ("Gemma-2-9B", GEMMA_2_9B, 9.24e9),
    ("Gemma-3-4B, its text part", GEMMA_3_4B, 3.88e9),
    ("Phi-3-mini", PHI_3_MINI, 3.82e9),
    ("SmolLM-135M", SMOL_135M, 0.1345e9),
    ("Mixtral-8x7B", MIXTRAL, 46.7e9),
    ("Qwen3-30B-A3B", QWEN_3_30B_A3B, 30.53e9),
    ("Qwen1.5-MoE-A2.7B", QWEN_15_MOE, 14.32e9),
]


@pytest.mark.parametrize(
    ("name", "config", "weights"), MODELS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_family_has_the_number_of_weights_that_it_is_known_for(name: str, config: object, weights: float) -> None:
    assert read_shape(config).total_weights == pytest.approx(weights, rel=0.005)
    assert plan_memory(job(config)).total > 0


def test_fused_projections_have_the_same_weights_and_fewer_adapter_weights() -> None:
    fused, plain = read_shape(PHI_3_MINI), read_shape({**PHI_3_MINI, "model_type": "llama"})
    assert fused.layer_weights == plain.layer_weights
    assert adapter_weights(job(PHI_3_MINI)) < adapter_weights(job({**PHI_3_MINI, "model_type": "llama"}))


@pytest.mark.parametrize("config", [MIXTRAL, QWEN_3_30B_A3B, QWEN_15_MOE], ids=lambda config: config["model_type"])
def test_experts_are_packed_by_nf4_alone(config: dict[str, Any]) -> None:
    shape = read_shape(config)
    plans = {kind: plan_memory(job(config, quantization=Quantization(type=kind))) for kind in ("nf4", "int8", "none")}
    weights = {kind: plan.weights_sharded * GIB for kind, plan in plans.items()}
    experts, linear = shape.layers * shape.expert_weights, shape.layers * shape.layer_weights
    assert weights["none"] - weights["nf4"] == pytest.approx(1.5 * (experts + linear))
    assert weights["none"] - weights["int8"] == pytest.approx(linear)
    assert plans["nf4"].weights_replicated * GIB > experts / 64, "scales of 8 bits, whole on each GPU"


def test_an_expert_that_all_tokens_go_through_is_adapted_and_counted() -> None:
    shape = read_shape(QWEN_15_MOE)
    assert [one.name for one in shape.targets(["gate_proj"])] == ["mlp.shared_expert.gate_proj"]
    assert shape.mlp_width == 4 * 1408 + 5632
    assert read_shape(QWEN_3_30B_A3B).mlp_width == 8 * 768


BAD_CONFIGS: list[tuple[object, str]] = [
    ([], "config.json"),
    ({}, "model_type"),
    ({**LLAMA_3_8B, "model_type": "gpt2"}, "model_type"),
    ({**LLAMA_3_8B, "model_type": ["llama"]}, "model_type"),
    ({"model_type": "gemma3"}, "text_config"),
    ({"model_type": "gemma3", "text_config": {"hidden_size": 1}}, "text_config.num_hidden_layers"),
    ({**LLAMA_3_8B, "hidden_size": "4096"}, "hidden_size"),
    ({**LLAMA_3_8B, "hidden_size": True}, "hidden_size"),
    ({**LLAMA_3_8B, "hidden_size": 10**400}, "hidden_size"),
    ({**LLAMA_3_8B, "num_hidden_layers": 0}, "num_hidden_layers"),
    ({**LLAMA_3_8B, "num_key_value_heads": 5}, "num_key_value_heads"),
    ({**LLAMA_3_8B, "hidden_size": 4097}, "head_dim"),
    ({**LLAMA_3_8B, "tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({**LLAMA_3_8B, "attention_bias": "no"}, "attention_bias"),
    ({**LLAMA_3_8B, "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({**MISTRAL_7B, "num_key_value_heads": None}, "num_key_value_heads"),
    ({**MISTRAL_7B, "model_type": "mixtral"}, "num_local_experts"),
    ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok"),
    ({**QWEN_3_30B_A3B, "num_experts": None}, "num_experts is missing"),
    ({**QWEN_15_MOE, "shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
]


@pytest.mark.parametrize(("config", "key"), BAD_CONFIGS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_understood_is_refused_with_its_key(config: object, key: str) -> None:
    with pytest.raises(BadSpecError, match=key):
        read_shape(config)


def test_targets_are_matched_by_the_end_of_their_name() -> None:
    shape = read_shape(LLAMA_3_8B)
    assert [one.name for one in shape.targets(["q_proj", "mlp.up_proj"])] == ["self_attn.q_proj", "mlp.up_proj"]
    with pytest.raises(BadSpecError, match=r"lora.targetModules: proj .* q_proj"):
        shape.targets(["proj"])


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({**QWEN_3_30B_A3B, "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({**QWEN_15_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step"),
    ],
    ids=["another family", "an MLP in one layer", "an MLP in every other layer"],
)
def test_an_architecture_that_cannot_be_planned_is_told_apart(config: dict[str, Any], key: str) -> None:
    with pytest.raises(UnplannedModelError, match=key):
        read_shape(config)


WRITTEN_BY_TRANSFORMERS = {key: value for key, value in QWEN_3_30B_A3B.items() if key != "num_experts"} | {
    "num_local_experts": 128
}
FAMILY_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("Llama-2-70B", LLAMA_2_70B),
    ("Llama-3-8B", LLAMA_3_8B),
    ("Llama with biases", {**LLAMA_3_8B, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    ("Mistral-7B", MISTRAL_7B),
    ("Mixtral-8x7B", MIXTRAL),
    ("Qwen3-30B-A3B", QWEN_3_30B_A3B),
    ("Qwen3-30B-A3B, written by transformers", WRITTEN_BY_TRANSFORMERS),
    ("Qwen3-MoE with biases", {**QWEN_3_30B_A3B, "num_hidden_layers": 2, "attention_bias": True}),
    ("Qwen1.5-MoE-A2.7B", QWEN_15_MOE),
    ("Qwen2-MoE without biases", {**QWEN_15_MOE, "num_hidden_layers": 2, "qkv_bias": False}),
    ("Gemma-2-9B", GEMMA_2_9B),
    ("Gemma-3-4B", {**GEMMA_3_4B["text_config"], "model_type": "gemma3_text"}),
    ("Qwen2.5-7B", QWEN_25_7B),
    ("Qwen3-8B", QWEN_3_8B),
    ("Qwen3 with biases", {**QWEN_3_8B, "num_hidden_layers": 2, "attention_bias": True}),
    ("Phi-3-mini", PHI_3_MINI),
    ("SmolLM2-135M", SMOL_135M),
    ("SmolLM3-3B", SMOL_3_3B),
]
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 331,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("sizes", [{}, TINY], ids=["published", "tiny"])
@pytest.mark.parametrize(("name", "config"), FAMILY_CONFIGS, ids=[name for name, _ in FAMILY_CONFIGS])
def test_the_number_of_weights_is_that_of_the_model_itself(
    name: str, config: dict[str, Any], sizes: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    numbers = {**config, **sizes}
    if numbers["model_type"] == "phi3":  # has no head_dim of its own: heads share the hidden size
        numbers.pop("head_dim", None)
    with torch.device("meta"):
        made = AutoConfig.for_model(**{"pad_token_id": 0, **numbers})
        model = AutoModelForCausalLM.from_config(made)
    assert read_shape(numbers).total_weights == sum(one.numel() for one in model.parameters())
