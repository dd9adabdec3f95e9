"""What fits a GPU: the shards, the micro-batch, and what is advised where a run does not fit."""

import re
from dataclasses import replace
from typing import Any

import pytest

from lora_api.run import RunSpec
from lora_api.training import Parallelism, Training
from lora_trainer.fitting import build_job, choose_shard_size, largest_fitting, micro_batches, settle, suggest
from lora_trainer.job import CPU, TRAINER, Job
from lora_trainer.memory import plan_memory
from lora_trainer.modelshape import read_shape
from tests.unit.trainer.configs import job
from tests.unit.trainer.published import LLAMA_2_70B, LLAMA_3_8B


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
