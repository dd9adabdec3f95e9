"""Every way of training together learns the same: 1, 2, 3 and 4 processes, in one set of processes for all cases."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

from lora_trainer.loading import ASYNC_SWITCH, Part, keeping, local_part
from lora_trainer.sharding import clip_gradients
from tests.support.tiny import make_model
from tests.trainer.gang import Case, run_cases
from tests.trainer.runs import build_run

Results = dict[str, list[dict[str, Any]]]

STEPS = 4

TRAINED: dict[str, tuple[list[int], dict[str, Any], bool]] = {
    "alone": ([0], {}, False),
    "alone-offload": ([1], {"cpuOffload": True}, False),
    "ddp-2": ([2, 3], {"strategy": "ddp"}, False),
    "ddp-4": ([0, 1, 2, 3], {"strategy": "ddp"}, False),
    "fsdp-2": ([0, 1], {"strategy": "fsdp"}, False),
    "fsdp-2-offload": ([2, 3], {"strategy": "fsdp", "cpuOffload": True}, False),
    "fsdp-4": ([0, 1, 2, 3], {"strategy": "fsdp"}, False),
    "fsdp-4-held": ([0, 1, 2, 3], {}, True),
    "hsdp-2x2": ([0, 1, 2, 3], {"strategy": "hsdp", "shardSize": 2}, False),
    "hsdp-2x2-offload": ([0, 1, 2, 3], {"strategy": "hsdp", "shardSize": 2, "cpuOffload": True}, False),
}
"""Case: its processes, ``parallelism``, and whether there is room to hold gathered layers."""

LAYOUTS = {
    "alone": ("whole", 1),
    "alone-offload": ("(Shard(dim=0),) of (1,)", 1),
    "ddp-2": ("whole", 1),
    "ddp-4": ("whole", 1),
    "fsdp-2": ("(Shard(dim=0),) of (2,)", 2),
    "fsdp-2-offload": ("(Shard(dim=0),) of (2,)", 2),
    "fsdp-4": ("(Shard(dim=0),) of (4,)", 4),
    "fsdp-4-held": ("(Shard(dim=0),) of (4,)", 4),
    "hsdp-2x2": ("(Replicate(), Shard(dim=0)) of (2, 2)", 2),
    "hsdp-2x2-offload": ("(Replicate(), Shard(dim=0)) of (2, 2)", 2),
}
"""Case: placements and mesh of every parameter, and processes that share one copy."""


def make_big_model(directory: Path) -> Path:
    """A random Llama of 47 million weights, 94 MB in bfloat16, in 12 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def results(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("gang")
    untied = make_model(directory / "untied", tied=False)
    big = make_big_model(directory / "big")
    weighed = {"model": str(big), "warm_up": str(model)}
    cases = [
        Case("memory-nf4", "load_and_weigh", [0], {**weighed, "quantization": "nf4"}),
        Case("memory-none", "load_and_weigh", [1], {**weighed, "quantization": "none"}),
        Case("load-tied", "load_both_ways", [0, 1], {"model": str(model)}),
        Case("load-untied", "load_both_ways", [1, 2, 3], {"model": str(untied)}),
    ]
    for name, (processes, parallelism, roomy) in TRAINED.items():
        own = directory / name
        changes = {
            "parallelism": {"nodes": len(processes), **parallelism},
            "training": {"maxSteps": STEPS, "microBatchSize": 1, "learningRate": 0.03, "evalEverySteps": 2},
            "checkpoint": {"everySteps": 2},
        }
        run = build_run(model, data, own, changes).to_wire()
        cases.append(Case(name, "train", processes, {"run": run, "directory": str(own), "roomy": roomy}))
    return run_cases(cases, directory)


@pytest.mark.parametrize("case", [name for name in TRAINED if name != "alone"])
def test_losses_and_adapters_are_those_of_one_process(case: str, results: Results) -> None:
    (alone,) = results["alone"]
    assert alone["evals"]["0"] - alone["evals"][str(STEPS)] > 0.05, "nothing is learned that could differ"
    for rank in results[case]:
        assert len(rank["losses"]) == STEPS
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert rank["norms"] == pytest.approx(alone["norms"], abs=1e-4)
        assert set(rank["evals"]) == {"0", "2", str(STEPS)}
        assert rank["evals"] == pytest.approx(alone["evals"], abs=1e-4)
    expected, found = (published(results[name][0]) for name in ("alone", case))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", TRAINED)
def test_each_strategy_is_what_it_says(case: str, results: Results) -> None:
    placements, shards = LAYOUTS[case]
    for rank in results[case]:
        assert rank["base"] == rank["trained"] == [placements]
        assert rank["local"] == rank["whole"] / shards
        assert rank["strategy"]["offload"] == ("offload" in case)
        assert rank["strategy"]["reshard"] == ("held" not in case)


@pytest.mark.parametrize(("case", "shards", "tied"), [("load-tied", 2, True), ("load-untied", 3, False)])
def test_a_model_that_is_loaded_in_parts_is_the_same_to_the_bit(
    case: str, shards: int, tied: bool, results: Results
) -> None:
    for rank in results[case]:
        assert rank["quantized"] == 14
        assert rank["names"]
        assert rank["different"] == []
        assert rank["logits"]
        assert rank["tied"] == tied
        assert rank["share"] == pytest.approx(1 / shards, abs=0.03)


@pytest.mark.parametrize("case", ["memory-nf4", "memory-none"])
def test_loading_in_parts_never_holds_the_whole_model(case: str, results: Results) -> None:
    (grown,) = results[case]
    assert grown["whole"] > 0.9 * grown["bytes"]
    assert grown["parts"] < 0.75 * grown["whole"]


@pytest.mark.parametrize(("rows", "expected"), [(6, [2, 2, 2]), (7, [3, 3, 1]), (4, [2, 2, 0]), (1, [1, 0, 0])])
def test_weights_are_cut_as_fsdp_cuts_them(rows: int, expected: list[int]) -> None:
    whole = torch.arange(rows * 2.0).view(rows, 2)
    parts = [Part(3, index).of(whole) for index in range(3)]
    assert [len(part) for part in parts] == expected
    assert torch.equal(torch.cat(parts), whole)
    for index, part in enumerate(parts):
        first = Part(3, index).first(rows)
        assert torch.equal(whole[first : first + len(part)], part)
    assert all(part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() for part in parts)


def test_only_what_came_from_the_files_is_cut_and_nothing_of_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ASYNC_SWITCH, raising=False)
    warm_up = transformers.modeling_utils.caching_allocator_warmup
    layer = torch.nn.Linear(4, 6)
    loaded = torch.nn.Parameter(torch.rand(6, 4), requires_grad=False)
    loaded._is_hf_initialized = True  # type: ignore[attr-defined]

    def load() -> None:
        with keeping(Part(2, 1)):
            layer.bias = torch.nn.Parameter(torch.zeros(6))
            layer.weight = loaded
            raise RuntimeError("a file is cut short")

    with pytest.raises(RuntimeError, match="a file is cut short"):
        load()
    assert local_part(layer.bias) is None
    part = local_part(layer.weight)
    assert part is not None
    assert torch.equal(part, loaded[3:])
    assert (layer.weight.shape, layer.weight.untyped_storage().nbytes()) == (loaded.shape, 4)
    layer.weight = loaded
    assert local_part(layer.weight) is None
    assert ASYNC_SWITCH not in os.environ
    assert transformers.modeling_utils.caching_allocator_warmup is warm_up


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_gradients_are_clipped_as_torch_does(limit: float) -> None:
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.grad = torch.linspace(-3, 4, parameter.numel()).view_as(parameter)
    assert clip_gradients(ours, limit) == pytest.approx(float(clip_grad_norm_(theirs.parameters(), limit)), rel=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_gradient_that_is_not_finite_is_left_as_it_is() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[float("inf"), 1.0]])
    assert clip_gradients(model, 1.0) == float("inf")
    assert model.weight.grad.tolist() == [[float("inf"), 1.0]]


def published(rank: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the adapter that rank 0 published."""
    return load_file(Path(rank["adapter"].removeprefix("file://")) / "adapter_model.safetensors")
