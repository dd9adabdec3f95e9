"""Every way of training together learns the same: 1, 2, 3 and 4 processes, in one set of processes for all cases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny import make_model
from tests.trainer.gang import Case, run_cases
from tests.trainer.runs import build_run

Results = dict[str, list[dict[str, Any]]]

STEPS = 4

TRAINED: dict[str, tuple[list[int], dict[str, Any], bool]] = {
    "alone": ([0], {}, False),
    "alone-offload": ([1], {"cpuOffload": True}, False),
    "ddp-2": ([2, 3], {"strategy": "ddp"}, False),
    "fsdp-2": ([0, 1], {"strategy": "fsdp"}, False),
    "fsdp-2-offload": ([2, 3], {"strategy": "fsdp", "cpuOffload": True}, False),
    "fsdp-4-held": ([0, 1, 2, 3], {}, True),
    "hsdp-2x2": ([0, 1, 2, 3], {"strategy": "hsdp", "shardSize": 2}, False),
}
"""Case: its processes, ``parallelism``, and whether there is room to hold gathered layers."""

LAYOUTS = {
    "alone": ("whole", 1),
    "alone-offload": ("(Shard(dim=0),) of (1,)", 1),
    "ddp-2": ("whole", 1),
    "fsdp-2": ("(Shard(dim=0),) of (2,)", 2),
    "fsdp-2-offload": ("(Shard(dim=0),) of (2,)", 2),
    "fsdp-4-held": ("(Shard(dim=0),) of (4,)", 4),
    "hsdp-2x2": ("(Replicate(), Shard(dim=0)) of (2, 2)", 2),
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


def published(rank: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the adapter that rank 0 published."""
    return load_file(Path(rank["adapter"].removeprefix("file://")) / "adapter_model.safetensors")
