"""The memory plan: held to published measurements, to configs of each family, and to what must always be so."""

import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_api.run import RunSpec
from lora_api.training import LoRA, Parallelism, Quantization, Training
from lora_trainer.errors import BadSpecError
from lora_trainer.fitting import build_job, choose_shard_size, largest_fitting, micro_batches, settle, suggest
from lora_trainer.hostmemory import available_bytes
from lora_trainer.memory import CPU, GIB, TRAINER, Job, MemoryPlan, adapter_weights, plan_memory, saved_bytes
from lora_trainer.memrecord import MemoryRecord, MemoryUse
from lora_trainer.modelshape import ModelShape, UnplannedModelError, Weights, read_shape
from tests.unit.trainer.published import EXTRA, LLAMA_2_70B, LLAMA_3_8B, LLAMA_3_70B, MISTRAL_7B, POINTS, Published

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
SMOL_3_3B: dict[str, Any] = {
    "model_type": "smollm3",
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
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
    ({**LLAMA_3_8B, "attention_bias": "no"}, "attention_bias"),
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


def test_loading_needs_no_more_than_training_but_where_each_gpu_loads_the_whole_model() -> None:
    sharded = job(LLAMA_2_70B, world_size=8)
    assert plan_memory(sharded).loading == 0
    whole = plan_memory(replace(sharded, stack=replace(sharded.stack, loads_whole=True)))
    assert whole.loading > 0
    assert whole.total > 34.2 * 1e9 / GIB


def test_offload_puts_70b_on_four_gpus_of_24_gb() -> None:
    four = job(LLAMA_3_70B, world_size=4, micro_batch=1, sequence=2048)
    assert not plan_memory(four).fits(22.3)
    assert plan_memory(replace(four, cpu_offload=True)).fits(22.3)


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
STRATEGY, OFFLOAD = "parallelism.strategy", "parallelism.cpuOffload"
GPUS, LENGTH = "parallelism.nodes * parallelism.gpusPerNode", "dataset.maxSeqLength"

ADVICE: list[tuple[str, Job, float, list[set[str]]]] = [
    ("room for a larger micro-batch", job(), 80, [{MICRO}]),
    ("nothing to say of a run that fills the GPU", job(micro_batch=16, sequence=4096), 49, []),
    ("a smaller micro-batch, or shorter sequences", job(micro_batch=16, sequence=4096), 24, [{MICRO}, {LENGTH, MICRO}]),
    (
        "sharded weights, where each GPU had all of them",
        job(LLAMA_2_70B, micro_batch=2, world_size=2, shard_size=1, stack=replace(TRAINER, loads_whole=False)),
        40,
        [{STRATEGY}, {GPUS, STRATEGY}, {LENGTH, STRATEGY}],
    ),
    (
        "weights in host memory, where nothing else helps",
        job(LLAMA_2_70B, world_size=64, sequence=256, stack=replace(TRAINER, loads_whole=False)),
        7,
        [{OFFLOAD}],
    ),
    (
        "checkpointing, where one sequence is too long without",
        job(micro_batch=2, sequence=8192, gradient_checkpointing=False),
        24,
        [{CHECKPOINTING}, {CHECKPOINTING, LENGTH}],
    ),
    (
        "more GPUs, each with less of the weights",
        job(LLAMA_2_70B, micro_batch=4, sequence=4096),
        60,
        [{MICRO}, {GPUS}, {LENGTH}],
    ),
    ("more GPUs hold a model that one cannot load", job(LLAMA_2_70B), 24, [{GPUS}]),
]


@pytest.mark.parametrize(("planned", "device", "wanted"), [row[1:] for row in ADVICE], ids=[row[0] for row in ADVICE])
def test_advice_comes_in_the_order_of_its_cost(planned: Job, device: float, wanted: list[set[str]]) -> None:
    assert [set(one) for one in changes(planned, 64, device)] == wanted


FAMILY_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("Llama-2-70B", LLAMA_2_70B),
    ("Llama-3-8B", LLAMA_3_8B),
    ("Llama with biases", {**LLAMA_3_8B, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    ("Mistral-7B", MISTRAL_7B),
    ("Mixtral-8x7B", MIXTRAL),
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


STRATEGIES: list[tuple[str, Parallelism, float | None, int]] = [
    ("ddp: whole on each", Parallelism(gpus_per_node=4, strategy="ddp"), 80, 1),
    ("fsdp: over all", Parallelism(nodes=2, gpus_per_node=4, strategy="fsdp"), 80, 8),
    ("hsdp: over a node's", Parallelism(nodes=2, gpus_per_node=4, strategy="hsdp"), 80, 4),
    ("hsdp: over so many", Parallelism(nodes=2, gpus_per_node=4, strategy="hsdp", shard_size=2), 80, 2),
    ("auto on one node", Parallelism(gpus_per_node=4), 80, 4),
    ("auto over nodes of one GPU", Parallelism(nodes=4, gpus_per_node=1), 80, 4),
    ("auto over nodes that hold the model", Parallelism(nodes=2, gpus_per_node=4), 80, 4),
    ("auto over nodes that do not", Parallelism(nodes=2, gpus_per_node=4), 8, 8),
    ("auto without knowing the GPU", Parallelism(nodes=2, gpus_per_node=4), None, 8),
]


@pytest.mark.parametrize(
    ("parallelism", "gib", "wanted"), [row[1:] for row in STRATEGIES], ids=[row[0] for row in STRATEGIES]
)
def test_how_many_share_a_copy_of_the_weights(parallelism: Parallelism, gib: float | None, wanted: int) -> None:
    assert choose_shard_size(job(world_size=parallelism.world_size), parallelism, gib) == wanted


def test_each_strategy_shards_what_it_says() -> None:
    ddp, hsdp, fsdp = (plan_memory(job(world_size=8, shard_size=size)) for size in (1, 4, None))
    alone = plan_memory(job())
    assert ddp.weights_sharded == alone.weights_sharded
    assert ddp.gathered_layers == 0
    assert ddp.lora_and_optimizer > alone.lora_and_optimizer, "the gradient is there twice, in the buckets too"
    assert hsdp.weights_sharded == pytest.approx(alone.weights_sharded / 4)
    assert fsdp.weights_sharded == pytest.approx(alone.weights_sharded / 8)
    assert hsdp.gathered_layers == fsdp.gathered_layers > 0
    offloaded = plan_memory(job(cpu_offload=True))
    assert offloaded.weights_sharded == offloaded.lora_and_optimizer == 0
    assert offloaded.gathered_layers > 0


def test_quantization_takes_the_bytes_that_it_says() -> None:
    nf4, int8, none = (plan_memory(job(quantization=Quantization(type=kind))) for kind in ("nf4", "int8", "none"))
    linear = read_shape(LLAMA_3_8B).weights.linear
    assert (int8.weights_sharded - nf4.weights_sharded) * GIB == pytest.approx(0.5 * linear)
    assert (none.weights_sharded - int8.weights_sharded) * GIB == pytest.approx(1.0 * linear)
    some = LoRA(target_modules=["q_proj"])
    keeping, freeing = (job(lora=some, quantization=Quantization(type=kind)) for kind in ("int8", "nf4"))
    assert saved_bytes(keeping) > saved_bytes(freeing), "int8 layers keep their input, adapted or not"
    assert none.weights_replicated == none.dequantization == 0


def test_a_preference_pair_is_two_sequences() -> None:
    pair, two = job(objective="dpo", micro_batch=4), job(micro_batch=8)
    assert plan_memory(pair) == plan_memory(two)


def test_eight_bit_moments_need_less_than_half_of_float32() -> None:
    full, small = job(), job(optimizer="paged-adamw-8bit")
    ratio = plan_memory(small).lora_and_optimizer / plan_memory(full).lora_and_optimizer
    assert ratio == pytest.approx((8 + 2 * (1 + 4 / 256)) / 16)


def test_attention_that_is_eager_has_its_scores_in_the_plan() -> None:
    short, long = (plan_memory(job(GEMMA_2_9B, sequence=length)).activations for length in (2048, 4096))
    scores = 16 * (2048**2) * (3 * 2 + 8)
    assert (long - 2 * short) * GIB == pytest.approx(2 * scores, rel=0.01)


def test_counted_weights_win_over_the_configuration() -> None:
    counted = job(counted=Weights(linear=10**9, rest=10**8))
    assert plan_memory(counted).weights_sharded * GIB == 0.5 * 10**9 + 2 * 10**8


def run_spec(**changes: Any) -> RunSpec:
    document: dict[str, Any] = {
        "namespace": "a",
        "name": "b",
        "uid": "c",
        "baseModel": {"uri": "hf://org/model"},
        "dataset": {"train": {"uri": "s3://data/x.jsonl"}, "maxSeqLength": 4096},
        "training": {"maxSteps": 1, "globalBatchSize": 48},
        "publish": {"store": "s3://models/x"},
    }
    return RunSpec.model_validate({**document, **changes})


def training(micro: object, size: int = 48) -> Training:
    return Training.model_validate({"maxSteps": 1, "globalBatchSize": size, "microBatchSize": micro})


def test_a_run_becomes_a_job() -> None:
    shape = read_shape(LLAMA_3_8B)
    planned = build_job(run_spec(), shape)
    assert (planned.micro_batch, planned.sequence, planned.shards, planned.stack) == (1, 4096, 1, TRAINER)
    assert build_job(run_spec(), shape, longest=700).sequence == 700
    packed = run_spec(dataset={"train": {"uri": "s3://data/x.jsonl"}, "packing": True})
    assert build_job(packed, shape, longest=700).sequence == 2048
    on_cpu = build_job(run_spec(parallelism={"gpusPerNode": 0}), shape)
    assert (on_cpu.stack, on_cpu.compute_bytes) == (CPU, 4)
    assert plan_memory(on_cpu).context == 0


SETTLED: list[tuple[str, object, float | None, int | None, str]] = [
    ("the largest that fits and divides", "auto", 28, 6, ""),
    ("all of it where there is room", "auto", 400, 48, ""),
    (
        "not one fits",
        "auto",
        10,
        None,
        r"not even 1 x 4096 tokens fit: a GPU needs .* and has 10.00 GiB; it fits with one of these",
    ),
    ("nothing helps", "auto", 1, None, "nothing less than a smaller model or more memory"),
    ("unknown memory", "auto", None, 1, "auto is 1"),
    ("what the user chose and fits", 2, 24, 2, ""),
    ("what the user chose and does not fit", 24, 24, 24, r"24 x 4096 tokens do not fit: .*microBatchSize: "),
    ("what the user chose for unknown memory", 24, None, 24, ""),
]


@pytest.mark.parametrize(
    ("micro", "gib", "wanted", "words"), [row[1:] for row in SETTLED], ids=[row[0] for row in SETTLED]
)
def test_the_micro_batch_is_settled(micro: object, gib: float | None, wanted: int | None, words: str) -> None:
    start = job(sequence=4096, micro_batch=1 if micro == "auto" else micro)
    found, complaint = settle(training(micro), start, gib)
    assert (None if found is None else found.micro_batch) == wanted
    assert bool(complaint) == bool(words)
    assert re.search(words, complaint), complaint


def cgroup(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


HOSTS: list[tuple[str, dict[str, str], int | None]] = [
    ("nothing says", {}, None),
    ("the machine alone", {"meminfo": "MemTotal: 9 kB\nMemAvailable: 3 kB\n"}, 3072),
    (
        "a container's limit, version 2, its file cache counted as free",
        {
            "meminfo": "MemAvailable: 999 kB",
            "self": "0::/pod",
            "memory.max": "5000\n",
            "memory.current": "3000\n",
            "memory.stat": "anon 1\ninactive_file 500\n",
        },
        2500,
    ),
    ("no limit, version 2", {"meminfo": "MemAvailable: 1 kB", "self": "0::/", "memory.max": "max"}, 1024),
    (
        "version 1, below the mount",
        {
            "self": "7:cpu:/a\n6:memory:/pod",
            "memory/pod/memory.limit_in_bytes": "700",
            "memory/pod/memory.usage_in_bytes": "800",
        },
        0,
    ),
]


@pytest.mark.parametrize(("files", "wanted"), [row[1:] for row in HOSTS], ids=[row[0] for row in HOSTS])
def test_memory_of_the_host_is_the_least_of_its_limits(tmp_path: Path, files: dict[str, str], wanted: int) -> None:
    root = cgroup(tmp_path, files)
    assert available_bytes(root, root / "self", root / "meminfo") == wanted


def test_this_machine_says_how_much_memory_it_has() -> None:
    assert 0 < (available_bytes() or 0) < 2**50


def test_an_architecture_that_is_not_known_is_told_apart() -> None:
    with pytest.raises(UnplannedModelError):
        read_shape({"model_type": "mamba"})


def test_planned_and_measured_stand_beside_each_other() -> None:
    plan = plan_memory(job())
    on_gpu = MemoryRecord(2, 4, True, plan, 24.0, MemoryUse(7.25, 8.5, 3.0))
    assert on_gpu.planned == plan.allocated
    assert on_gpu.to_progress()["allocated_gib"] == 7.25
    rows = dict(on_gpu.to_rows())
    assert rows["measured: allocated by torch, GiB"] == "7.250"
    assert rows["planned, GPU memory of one process, GiB"] == f"{plan.allocated:.3f}"
    on_cpu = MemoryRecord(1, 1, False, None, None, MemoryUse(host=1.0))
    assert [name for name, _ in on_cpu.to_rows()] == [
        "micro-batch, sequences",
        "measured: resident memory of the process, GiB",
    ]
    assert isinstance(MemoryPlan(**vars(plan)), MemoryPlan)
