"""The memory plan: held to published measurements, and to what must always be so."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_api.training import LoRA, Quantization
from lora_trainer.job import Job
from lora_trainer.memory import GIB, adapter_weights, loading_bytes, plan_memory, saved_bytes
from lora_trainer.memrecord import MemoryRecord, MemoryUse
from lora_trainer.modelshape import ModelShape, Weights, read_shape
from tests.unit.trainer.configs import GEMMA_2_9B, job
from tests.unit.trainer.published import EXTRA, LLAMA_2_70B, LLAMA_3_8B, LLAMA_3_70B, POINTS, Published

DOCUMENT = Path(__file__).parents[3] / "docs" / "memory.md"


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


def test_an_adapter_on_all_linear_layers_has_the_weights_of_the_formula() -> None:
    h, kv, f = 4096, 1024, 14336
    assert adapter_weights(job(lora=LoRA(r=16))) == 32 * 16 * (4 * h + 2 * (h + kv) + 3 * (h + f))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # PEFT 0.21 reads it
def test_each_module_of_an_adapter_counts_with_its_own_rank() -> None:
    """The number is that of PEFT, on a model that has the shape of the plan's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_trainer.model import add_adapter

    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 96}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    lora = LoRA(r=4, rank_pattern={"layers.1.mlp.down_proj": 16, "q_proj": 1, "down_proj": 8})
    with torch.device("meta"):
        model = add_adapter(LlamaForCausalLM(LlamaConfig(**sizes)), lora, seed=1)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert adapter_weights(job({"model_type": "llama", **sizes}, lora=lora)) == trained
    assert trained != adapter_weights(job({"model_type": "llama", **sizes}, lora=LoRA(r=4)))


@pytest.mark.parametrize(("tied", "objective"), [(False, "sft"), (True, "sft"), (False, "dpo")])
def test_new_tokens_take_whole_rows_on_every_gpu(tied: bool, objective: str) -> None:
    plain = replace(job(), objective=objective, world_size=4)
    plain = replace(plain, shape=replace(plain.shape, tied=tied))
    more = replace(plain, lora=plain.lora.model_copy(update={"new_tokens": ["<|a|>", "<|b|>"]}))
    grown = (plan_memory(more).lora_and_optimizer - plan_memory(plain).lora_and_optimizer) * GIB
    assert grown == pytest.approx(16 * 2 * 4096 * (1 if tied else 2))


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
    loads_whole = replace(sharded, stack=replace(sharded.stack, loads_whole=True))
    whole = plan_memory(loads_whole)
    assert whole.loading > 0
    assert whole.total > 34.2 * 1e9 / GIB
    assert whole.allocated == pytest.approx(loading_bytes(loads_whole) / GIB), "the peak is that of loading, once"


def test_offload_puts_70b_on_four_gpus_of_24_gb() -> None:
    four = job(LLAMA_3_70B, world_size=4, micro_batch=1, sequence=2048)
    assert not plan_memory(four).fits(22.3)
    assert plan_memory(replace(four, cpu_offload=True)).fits(22.3)


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
