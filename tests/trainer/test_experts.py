"""Routed experts in NF4: what they answer, what is unpacked for it, and runs on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from lora_api.training import LoRA, Quantization
from lora_trainer.architecture import read_architecture
from lora_trainer.errors import BadSpecError
from lora_trainer.experts import NAMES, PackedExperts
from lora_trainer.loading import Part
from lora_trainer.model import add_adapter, load_base_model
from lora_trainer.packed import find_packed
from tests.support.families import SIZES, make_family
from tests.trainer.gang import Case, run_cases
from tests.trainer.runs import build_run

CPU = torch.device("cpu")
MIXTURES = ("mixtral", "qwen-2-moe", "qwen-3-moe", "phi-3.5-moe")
TRAINED: dict[str, tuple[list[int], dict[str, Any]]] = {
    "alone": ([0], {}),
    "fsdp": ([1, 2], {"strategy": "fsdp"}),
    "hsdp-offload": ([0, 1, 2, 3], {"strategy": "hsdp", "shardSize": 2, "cpuOffload": True}),
}
"""Case: processes, and ``parallelism``."""


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_family(family, tmp_path_factory.mktemp("mixture") / family)
        return made[family]

    return make


def packed_experts(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def unpack(experts: PackedExperts) -> nn.Module:
    """transformers' own module with the weights that ``experts`` stand for, in the same type."""
    kind = type(experts).__mro__[2]
    with torch.device("meta"):
        plain: nn.Module = kind(experts.config)
    for name in NAMES:
        weight = dequantize_4bit(getattr(experts, name).data, experts.packed_states[name])
        setattr(plain, name, nn.Parameter(weight, requires_grad=False))
    plain.config = type(experts.config)(**experts.config.to_dict())
    plain.config._experts_implementation = "eager"
    return plain


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_experts_answer_as_unpacked_ones_do(family: str, double: bool, mixtures: Callable[[str], Path]) -> None:
    model = load_base_model(mixtures(family), Quantization(double_quant=double), CPU)
    experts = packed_experts(model)
    assert len(experts) == 2, "both layers"
    plain = unpack(experts[1])
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(13, 64, generator=generator)
    chosen = torch.rand(13, 4, generator=generator).topk(2, dim=1).indices
    weights = torch.rand(13, 2, generator=generator)
    found = []
    for module in (experts[1], plain):
        inputs, scores = values.clone().requires_grad_(), weights.clone().requires_grad_()
        output = module(inputs, chosen, scores)
        output.square().sum().backward()
        found.append((output.detach(), inputs.grad, scores.grad))
    for packed, reference in zip(*found, strict=True):
        torch.testing.assert_close(packed, reference, atol=1e-5, rtol=1e-5)


def test_experts_that_no_token_chose_are_not_unpacked(mixtures: Callable[[str], Path]) -> None:
    """Their scales are broken here: whoever unpacks them gets what is no number."""
    model = load_base_model(mixtures("mixtral"), Quantization(double_quant=False), CPU)
    experts = packed_experts(model)[0]
    values, chosen, weights = torch.ones(3, 64), torch.tensor([[0, 2], [2, 0], [0, 2]]), torch.ones(3, 2)
    want = experts(values, chosen, weights)
    for state in experts.packed_states.values():
        state.absmax.view(4, -1)[[1, 3]] = float("nan")
    assert torch.equal(experts(values, chosen, weights), want)
    assert not torch.isfinite(experts(values, chosen + 1, weights)).all()


@pytest.mark.parametrize("part", [None, Part(3, 1)])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_model_is_the_same_architecture_with_packed_experts(
    family: str, part: Part | None, mixtures: Callable[[str], Path]
) -> None:
    plain, packed = (
        read_architecture(load_base_model(mixtures(family), Quantization(type=kind), CPU, part))
        for kind in ("none", "nf4")
    )
    assert packed.experts == plain.experts
    assert packed.routers == plain.routers
    assert packed.linears == plain.linears


def test_experts_are_bytes_that_are_cut_evenly(mixtures: Callable[[str], Path]) -> None:
    whole, parts = (
        {
            weight.name: weight.here
            for weight in find_packed(load_base_model(mixtures("mixtral"), Quantization(), CPU, part))
        }
        for part in (None, Part(8, 5))
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert whole[name].dtype == torch.uint8
    assert whole[name].numel() == 4 * 2 * 96 * 64 // 2
    size = whole[name].numel() // 8
    assert torch.equal(parts[name], whole[name][5 * size : 6 * size]), "8 processes share 4 experts"


@pytest.mark.parametrize("kind", ["int8", "none"])
def test_only_nf4_packs_experts(kind: Any, mixtures: Callable[[str], Path]) -> None:
    model = load_base_model(mixtures("mixtral"), Quantization(type=kind), CPU)
    assert not packed_experts(model)


def test_experts_that_fill_no_blocks_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(**{**SIZES, "hidden_size": 8, "intermediate_size": 4}, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BadSpecError, match=r"an expert's (down|gate_up)_proj of .* weights does not fill blocks of 64"):
        load_base_model(tmp_path, Quantization(), CPU)


@pytest.fixture(scope="module")
def results(
    mixtures: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("gang")
    cases = []
    for name, (processes, parallelism) in TRAINED.items():
        changes = {
            "parallelism": {"nodes": len(processes), **parallelism},
            "training": {"maxSteps": 4, "microBatchSize": 1, "learningRate": 0.03},
            "checkpoint": {"everySteps": 2},
        }
        run = build_run(mixtures("qwen-3-moe"), data, directory / name, changes).to_wire()
        cases.append(Case(name, "train", processes, {"run": run, "directory": str(directory / name)}))
    return run_cases(cases, directory)


@pytest.mark.parametrize("case", [name for name in TRAINED if name != "alone"])
def test_runs_on_sharded_experts_learn_what_one_process_learns(
    case: str, results: dict[str, list[dict[str, Any]]]
) -> None:
    (alone,) = results["alone"]
    assert alone["evals"]["0"] - alone["evals"]["4"] > 0.02, "nothing is learned that could differ"
    for rank in results[case]:
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert rank["norms"] == pytest.approx(alone["norms"], abs=1e-4)
        assert rank["evals"] == pytest.approx(alone["evals"], abs=1e-4)
        assert rank["local"] == pytest.approx(rank["whole"] / 2, rel=0.01)


def test_an_adapter_of_packed_experts_is_one_of_the_plain_model(
    results: dict[str, list[dict[str, Any]]], mixtures: Callable[[str], Path]
) -> None:
    directory = Path(results["fsdp"][0]["adapter"].removeprefix("file://"))
    plain = AutoModelForCausalLM.from_pretrained(mixtures("qwen-3-moe")).eval()
    ids = torch.arange(24).view(2, 12) % 7 + 3
    with torch.no_grad():
        before = plain(ids).logits
        served = PeftModel.from_pretrained(plain, directory).eval()
        after = served(ids).logits
        packed = load_base_model(mixtures("qwen-3-moe"), Quantization(), CPU).eval()
        trained = PeftModel.from_pretrained(packed, directory).eval()(ids).logits
    assert float((after - before).abs().max()) > 0.05
    assert float((after - trained).abs().mean()) < 0.5 * float((after - before).abs().mean()), "but for NF4's error"
    assert "experts" not in json.dumps(sorted(served.peft_config["default"].target_modules))


def test_the_adapter_sits_beside_packed_experts(mixtures: Callable[[str], Path]) -> None:
    model = add_adapter(load_base_model(mixtures("qwen-2-moe"), Quantization(), CPU), LoRA(), 0)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert not [name for name in names if ".experts." in name or "shared_expert_gate" in name]
    assert any(".shared_expert.gate_proj." in name for name in names)
