"""The memory plan: held to published measurements, to configs of each family, and to what must always be so."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_api.training import LoRA, Quantization
from lora_trainer.errors import BadSpecError
from lora_trainer.fitting import largest_fitting, micro_batches, suggest
from lora_trainer.memory import GIB, Job, adapter_weights, plan_memory
from lora_trainer.modelshape import ModelShape, read_shape
from tests.unit.trainer.published import EXTRA, LLAMA_2_70B, LLAMA_3_8B, MISTRAL_7B, POINTS, Published

DOCUMENT = Path(__file__).parents[3] / "docs" / "memory.md"

QWEN_3_8B = {**LLAMA_3_8B, "model_type": "qwen3", "intermediate_size": 12288, "vocab_size": 151936, "head_dim": 128}
QWEN_3_8B["num_hidden_layers"] = 36
QWEN_25_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
GEMMA_2_9B: dict[str, Any] = {
    "model_type": "gemma2",
    "num_hidden_layers": 42,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
}
GEMMA_3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "hidden_size": 2560,
        "intermediate_size": 10240,
    },
}
PHI_3_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "num_hidden_layers": 32,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
SMOL_135M: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MIXTRAL = {**MISTRAL_7B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def job(config: object = LLAMA_3_8B, **changes: Any) -> Job:
    settings: dict[str, Any] = {"lora": LoRA(), "quantization": Quantization(), "micro_batch": 1, "sequence": 2048}
    return Job(read_shape(config), **{**settings, **changes})


@pytest.mark.parametrize("point", POINTS + EXTRA, ids=lambda point: f"{point.name} x{point.batch} on {point.gpus}")
def test_no_published_measurement_is_missed_by_15_percent(point: Published) -> None:
    assert abs(point.error) < 0.15, point.to_row()


def test_half_of_the_published_measurements_are_met_within_5_percent() -> None:
    assert statistics.median(abs(point.error) for point in POINTS) < 0.05
    assert statistics.median(abs(point.error) for point in EXTRA) < 0.05


def test_the_document_shows_these_figures() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for point in POINTS + EXTRA:
        assert point.to_row() in text


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


def test_an_adapter_on_all_linear_layers_has_the_weights_of_the_formula() -> None:
    h, kv, f = 4096, 1024, 14336
    assert adapter_weights(job(lora=LoRA(r=16))) == 32 * 16 * (4 * h + 2 * (h + kv) + 3 * (h + f))


def test_experts_are_not_quantized() -> None:
    shape = read_shape(MIXTRAL)
    assert plan_memory(job(MIXTRAL)).weights_sharded * GIB > 2 * 32 * shape.expert_weights


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
    ({**LLAMA_3_8B, "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({**MISTRAL_7B, "num_key_value_heads": None}, "num_key_value_heads"),
    ({**MISTRAL_7B, "model_type": "mixtral"}, "num_local_experts"),
    ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok"),
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


SHAPES = st.builds(
    lambda layers, heads, kv, size, f, words, tied: ModelShape(
        "llama", layers, heads * size, f, heads, heads // kv, size, words, tied
    ),
    st.integers(1, 100),
    st.sampled_from([8, 16, 32, 64]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([64, 128, 256]),
    st.integers(64, 40_000),
    st.integers(100, 300_000),
    st.booleans(),
)
QUANTIZATIONS = st.builds(
    Quantization,
    type=st.sampled_from(["nf4", "none"]),
    double_quant=st.booleans(),
    compute_dtype=st.sampled_from(["auto", "float32"]),
)
JOBS = st.builds(
    Job,
    SHAPES,
    st.builds(LoRA, r=st.integers(1, 512), dropout=st.sampled_from([0.0, 0.1])),
    QUANTIZATIONS,
    st.integers(1, 64),
    st.integers(8, 131_072),
    st.sampled_from([1, 2, 3, 8, 64]),
    st.booleans(),
)


@given(JOBS)
def test_parts_are_never_negative_and_add_up(planned: Job) -> None:
    plan = plan_memory(planned)
    assert all(size >= 0 for size in plan.parts().values())
    assert sum(plan.parts().values()) == plan.total
    assert plan.allocated <= plan.reserved <= plan.on_device <= plan.safe


@given(JOBS, st.floats(0.1, 1000))
def test_a_run_fits_exactly_if_the_safe_figure_does(planned: Job, device_gib: float) -> None:
    plan = plan_memory(planned)
    assert plan.fits(device_gib) == (plan.safe <= device_gib)
    assert plan.fits(plan.safe)


@given(JOBS, st.integers(1, 64), st.integers(1, 10_000))
def test_more_tokens_never_need_less(planned: Job, more: int, longer: int) -> None:
    total = plan_memory(planned).total
    assert plan_memory(replace(planned, micro_batch=planned.micro_batch + more)).total >= total - 1e-9
    assert plan_memory(replace(planned, sequence=planned.sequence + longer)).total >= total - 1e-9


@given(JOBS, st.integers(2, 16))
def test_sharding_never_increases_what_is_sharded(planned: Job, factor: int) -> None:
    """From one GPU to two, gathered layers and NCCL come in; from then on the total only falls."""
    plan, wider = plan_memory(planned), plan_memory(replace(planned, world_size=planned.world_size * factor))
    assert wider.weights_sharded <= plan.weights_sharded
    assert wider.lora_and_optimizer <= plan.lora_and_optimizer
    if planned.world_size > 1:
        assert wider.total <= plan.total + 1e-9


@given(JOBS)
def test_gradient_checkpointing_never_needs_more(planned: Job) -> None:
    assume(planned.shape.layers > 1)
    with_it, without = (plan_memory(replace(planned, gradient_checkpointing=flag)).total for flag in (True, False))
    assert with_it <= without + 1e-9


def test_a_model_is_loaded_whole_on_each_gpu() -> None:
    plan = plan_memory(job(LLAMA_2_70B, world_size=8))
    assert plan.loading > 0
    assert plan.total > 34.2 * 1e9 / GIB


def test_micro_batches_divide_the_share_of_a_gpu() -> None:
    assert micro_batches(48, 4) == [12, 6, 4, 3, 2, 1]
    assert micro_batches(48, 5) == []


def test_the_largest_micro_batch_that_fits_is_found() -> None:
    best = largest_fitting(job(sequence=4096), 64, 40.0)
    assert best is not None
    assert plan_memory(best).fits(40.0)
    assert not plan_memory(replace(best, micro_batch=best.micro_batch * 2)).fits(40.0)
    assert largest_fitting(job(LLAMA_2_70B), 64, 24.0) is None


def changes(planned: Job, global_batch_size: int, device_gib: float) -> list[dict[str, int | bool]]:
    found = suggest(planned, global_batch_size, device_gib)
    assert all(one.plan.fits(device_gib) for one in found)
    return [one.changes for one in found]


MICRO, CHECKPOINTING = "training.microBatchSize", "training.gradientCheckpointing"
GPUS, LENGTH = "parallelism.nodes * parallelism.gpusPerNode", "dataset.maxSeqLength"

ADVICE: list[tuple[str, Job, float, list[set[str]]]] = [
    ("room for a larger micro-batch", job(), 80, [{MICRO}]),
    ("nothing to say of a run that fills the GPU", job(micro_batch=16, sequence=4096), 49, []),
    ("a smaller micro-batch, or shorter sequences", job(micro_batch=16, sequence=4096), 24, [{MICRO}, {LENGTH, MICRO}]),
    (
        "checkpointing, where one sequence is too long without",
        job(micro_batch=2, sequence=8192, gradient_checkpointing=False),
        24,
        [{CHECKPOINTING}],
    ),
    ("more GPUs, each with less of the weights", job(LLAMA_2_70B, micro_batch=4, sequence=4096), 60, [{MICRO}, {GPUS}]),
    ("nothing helps a model that cannot be loaded", job(LLAMA_2_70B), 24, []),
]


@pytest.mark.parametrize(("planned", "device", "wanted"), [row[1:] for row in ADVICE], ids=[row[0] for row in ADVICE])
def test_advice_comes_in_the_order_of_its_cost(planned: Job, device: float, wanted: list[set[str]]) -> None:
    assert [set(one) for one in changes(planned, 64, device)] == wanted
