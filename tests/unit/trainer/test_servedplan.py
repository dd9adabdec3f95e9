"""Whether the adapter can be evaluated on its base as it is served, and how."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_api.finetune import LoRAFineTuneSpec
from lora_api.publishing import choose_served_dtype
from lora_api.training import Quantization
from lora_trainer.fitting import build_job
from lora_trainer.memory import GIB, plan_memory, weight_bytes
from lora_trainer.modelshape import read_shape
from lora_trainer.served import choose_part
from lora_trainer.servedplan import SERVED_RECORDS, plan_served
from tests.trainer.runs import merge
from tests.unit.trainer.configs import MIXTRAL
from tests.unit.trainer.published import LLAMA_3_8B, LLAMA_3_70B


def make_spec(**changes: Any) -> LoRAFineTuneSpec:
    document = {
        "baseModel": {"uri": "hf://org/model"},
        "dataset": {"train": {"uri": "s3://d/t.jsonl"}, "maxSeqLength": 2048},
        "training": {"maxSteps": 10, "globalBatchSize": 64, "microBatchSize": 2},
        "parallelism": {"nodes": 1, "gpusPerNode": 1},
        "publish": {"store": "s3://models/a"},
    }
    return LoRAFineTuneSpec.model_validate(merge(document, changes))


@dataclass(frozen=True)
class Case:
    """``want``: offload, tokens in a batch; ``problem``: words of it."""

    config: dict[str, object]
    device: float | None
    host: float | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    want: tuple[bool, int] | None = None
    problem: str = ""


EIGHT = {"parallelism": {"gpusPerNode": 8}}
CASES = {
    "8B in bfloat16 fits on one GPU of 24 GiB": Case(LLAMA_3_8B, 24, 64, want=(False, 4096)),
    "where a whole micro-batch does not fit, one sequence may": Case(
        LLAMA_3_8B, 24, 64, {"training": {"microBatchSize": 32}}, want=(False, 2048)
    ),
    "8B does not fit on 16 GiB, and is kept in host memory": Case(LLAMA_3_8B, 16, 64, want=(True, 4096)),
    "host memory that is too small does not help": Case(
        LLAMA_3_8B, 16, 12,
        problem="of each GPU to be safe, and there are 16.00, and its host memory does not hold it either",
    ),
    "host memory does not help where not even one layer fits": Case(
        LLAMA_3_70B, 6, problem="GPU to be safe, and there are 6.00; with its weights in host memory it needs"
    ),
    "70B in bfloat16 is spread over 8 GPUs": Case(LLAMA_3_70B, 80, 100, EIGHT, want=(False, 4096)),
    "also where the training is ddp": Case(
        LLAMA_3_70B, 80, 100, merge(EIGHT, {"parallelism": {"strategy": "ddp"}}), want=(False, 4096)
    ),
    "float32 takes twice as much": Case(
        LLAMA_3_8B, 24, 64, {"publish": {"servedDtype": "float32"}}, want=(True, 4096)
    ),
    "memory that is not known is taken to be enough": Case(LLAMA_3_70B, None, want=(False, 4096)),
    "on CPUs there is no other memory to keep it in": Case(
        LLAMA_3_8B, 16, None, {"parallelism": {"gpusPerNode": 0}}, problem="of each process to be safe"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_way_is_chosen_by_memory(name: str) -> None:
    case = CASES[name]
    spec = make_spec(**case.changes)
    plan = plan_served(spec, build_job(spec, read_shape(case.config), device_gib=case.device), case.device, case.host)
    assert plan.memory is not None
    if case.want is None:
        assert plan.problem is not None
        assert case.problem in plan.problem
        assert not plan.is_wanted
        assert plan.problem in plan.to_text()
        return
    assert plan.problem is None
    assert (plan.is_wanted, plan.offload, plan.token_budget) == (True, *case.want)
    if case.device is not None:
        assert plan.memory.fits(case.device)
    strategy = plan.strategy(spec.parallelism.world_size)
    alone = spec.parallelism.world_size == 1 and not plan.offload
    assert (strategy.kind, strategy.offload) == ("alone" if alone else "fsdp", plan.offload)
    assert strategy.shards == spec.parallelism.world_size
    assert f"({plan.dtype}, publish.servedDtype)" in plan.to_text()


@pytest.mark.parametrize(
    ("quantization", "gpus", "served", "same"),
    [
        ("nf4", 1, None, False),
        ("int8", 1, None, False),
        ("none", 1, None, True),
        ("none", 0, None, True),
        ("none", 1, "float32", False),
        ("none", 0, "bfloat16", False),
        ("none", 1, "bfloat16", True),
    ],
)
def test_the_base_that_is_trained_on_may_be_the_one_that_is_served(
    quantization: str, gpus: int, served: str | None, same: bool
) -> None:
    spec = make_spec(
        quantization={"type": quantization}, parallelism={"gpusPerNode": gpus}, publish={"servedDtype": served}
    )
    plan = plan_served(spec, build_job(spec, read_shape(LLAMA_3_8B)), None)
    assert (plan.same_base, plan.is_wanted) == (same, not same)
    assert plan.dtype == choose_served_dtype(spec.publish, gpus) == (served or ("bfloat16" if gpus else "float32"))


def test_an_architecture_that_is_not_planned_is_not_loaded_on_trust() -> None:
    plan = plan_served(make_spec(), None, 80)
    assert plan.problem == "how much memory this architecture needs is not known"
    assert not plan.is_wanted


def test_the_document_shows_a_figure_of_today() -> None:
    text = (Path(__file__).parents[3] / "docs" / "memory.md").read_text(encoding="utf-8")
    spec = make_spec()
    assert plan_served(spec, build_job(spec, read_shape(LLAMA_3_8B), device_gib=24), 24).to_text() in text


def test_the_plan_is_the_weights_and_what_one_layer_and_the_loss_take() -> None:
    spec = make_spec()
    job = build_job(spec, read_shape(LLAMA_3_8B), device_gib=80)
    plan = plan_served(spec, job, 80)
    assert plan.memory is not None
    weights = 2 * job.shape.total_weights / GIB
    assert plan.memory.weights_sharded == pytest.approx(weights)
    assert weights < plan.memory.total < weights + 5
    assert plan.memory.total > plan_memory(job).weights_sharded, "quantized weights are smaller"
    assert weight_bytes(job) / GIB < weights
    assert job.quantization == Quantization()


def test_a_mixture_that_is_whole_on_one_gpu_needs_more_while_its_experts_are_joined() -> None:
    """The gates of a layer's experts are there twice meanwhile; later one layer's values are all that is added."""
    spec = make_spec()
    plan = plan_served(spec, build_job(spec, read_shape(MIXTRAL)), None)
    assert plan.memory is not None
    joined = 2 * 2 * 8 * 2 * 4096 * 14336 / GIB
    assert 0 < plan.memory.loading < joined
    assert plan.memory.allocated == pytest.approx(plan.memory.weights_sharded + joined, rel=1e-6)


@pytest.mark.parametrize(("records", "most", "want"), [(0, 4, None), (4, 4, None), (5, 4, [0, 1, 2, 3]),
                                                      (12, 4, [0, 3, 6, 9]), (7, 3, [0, 2, 4])])  # fmt: skip
def test_a_part_of_the_records_is_spread_evenly(records: int, most: int, want: list[int] | None) -> None:
    assert choose_part(records, most) == want


def test_so_many_records_are_measured() -> None:
    part = choose_part(10_000)
    assert part is not None
    assert len(set(part)) == SERVED_RECORDS == 256
