"""The run document and the batch plan."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_api import LoRAFineTune, RunSpec, build_run_spec, plan_batch
from lora_api.training import MAX_GLOBAL_BATCH_SIZE, Parallelism, Training

RUN = LoRAFineTune.model_validate(
    {
        "metadata": {"name": "support", "namespace": "team", "uid": "u-1", "managedFields": []},
        "spec": {
            "baseModel": {"uri": "s3://models/m"},
            "dataset": {"train": {"uri": "s3://data/t.jsonl"}},
            "training": {"maxSteps": 18},
            "publish": {"store": "s3://adapters"},
        },
    }
)


def test_the_document_survives_its_file() -> None:
    document = build_run_spec(RUN, attempt=2)
    text = document.model_dump_json(by_alias=True, exclude_none=True)
    assert RunSpec.model_validate_json(text) == document
    assert RunSpec.model_validate(document.to_wire()) == document
    assert (document.namespace, document.name, document.uid, document.attempt) == ("team", "support", "u-1", 2)
    assert document.training == RUN.spec.training


def test_an_adapter_is_named_after_the_run_unless_told_otherwise() -> None:
    document = build_run_spec(RUN, 1)
    assert document.adapter_name == "support"
    named = document.model_copy(update={"publish": document.publish.model_copy(update={"name": "tickets"})})
    assert named.adapter_name == "tickets"


def test_a_field_that_the_trainer_does_not_know_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"lora\.rank"):
        RunSpec.model_validate(build_run_spec(RUN, 1).to_wire() | {"lora": {"rank": 8}})


def test_what_the_preflight_settled_is_what_an_attempt_gets() -> None:
    spec = {
        **RUN.spec.to_wire(),
        "baseModel": {"uri": "hf://org/model", "revision": "main"},
        "dataset": {"train": {"uri": "hf://org/data", "split": "train"}, "eval": {"uri": "s3://data/e.jsonl"}},
        "training": {"maxSteps": 18, "globalBatchSize": 8, "microBatchSize": "auto"},
    }
    pin = {"files": 1, "sizeBytes": 10}
    digest = "sha256:" + "d" * 64
    pins = {
        "baseModel": {"uri": "hf://org/model", "revision": "c0ffee", **pin},
        "train": {"uri": "hf://org/data", "revision": "beef", **pin},
        "eval": {"uri": "s3://data/e.jsonl", "digest": digest, **pin},
    }
    status = {"pins": pins, "plan": {"microBatchSize": 4, "processes": 1, "shardSize": 1}}
    run = LoRAFineTune.model_validate({"metadata": {"name": "a", "namespace": "b", "uid": "c"}, "spec": spec})
    before = build_run_spec(run, 1)
    assert (before.base_model.revision, before.training.micro_batch_size, before.pins) == ("main", "auto", None)
    pinned = run.model_copy(update={"status": run.status.model_validate(status)})
    document = build_run_spec(pinned, 2)
    assert (document.base_model.revision, document.dataset.train.revision) == ("c0ffee", "beef")
    assert document.dataset.train.split == "train"
    assert document.dataset.eval is not None
    assert document.dataset.eval.revision is None
    assert document.training.micro_batch_size == 4
    assert document.pins == pinned.status.pins
    assert RunSpec.model_validate(document.to_wire()) == document


PLANS = {
    "one process": (16, 1, 1, 1, (1, 16, 1)),
    "CPU nodes have one process each": (8, 2, 2, 0, (2, 2, 2)),
    "two nodes of eight": (64, 2, 2, 8, (2, 2, 16)),
    "no accumulation": (16, 1, 2, 8, (1, 1, 16)),
}


@pytest.mark.parametrize("case", PLANS)
def test_accumulation_is_derived(case: str) -> None:
    size, micro, nodes, gpus, want = PLANS[case]
    plan = plan_batch(
        Training(max_steps=1, global_batch_size=size, micro_batch_size=micro),
        Parallelism(nodes=nodes, gpus_per_node=gpus),
    )
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.world_size) == want


REFUSED = {
    "between two": (30, 4, 3, 0, r"must be a multiple .* = 12; the nearest: 24 and 36$"),
    "below the first": (3, 4, 3, 0, r"= 12; the nearest: 12$"),
    "the one above is out of bounds": (65536, 1, 1, 15, r"= 15; the nearest: 65535$"),
    "one step is out of bounds": (65536, 1024, 64, 2, r"^training\.microBatchSize: .* is 131072, .* at most 65536$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_size_that_does_not_divide_is_refused_with_the_nearest(case: str) -> None:
    size, micro, nodes, gpus, words = REFUSED[case]
    training = Training(max_steps=1, global_batch_size=size, micro_batch_size=micro)
    with pytest.raises(ValueError, match=words):
        plan_batch(training, Parallelism(nodes=nodes, gpus_per_node=gpus))


@given(st.integers(1, MAX_GLOBAL_BATCH_SIZE), st.integers(1, 1024), st.integers(1, 64), st.integers(0, 16))
def test_a_plan_is_exact_and_advice_is_good(size: int, micro: int, nodes: int, gpus: int) -> None:
    parallelism = Parallelism(nodes=nodes, gpus_per_node=gpus)
    assume(micro * parallelism.world_size <= MAX_GLOBAL_BATCH_SIZE)

    def plan(global_batch_size: int) -> int:
        training = Training(max_steps=1, global_batch_size=global_batch_size, micro_batch_size=micro)
        return plan_batch(training, parallelism).global_batch_size

    try:
        assert plan(size) == size
    except ValueError as error:
        nearest = [int(text) for text in re.findall(r"\d+", str(error).partition("the nearest: ")[2])]
        assert nearest
        for advised in nearest:
            assert plan(advised) == advised
