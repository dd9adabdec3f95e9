"""rsLoRA is published in a form that every reader scales right: alpha * sqrt(r), and no flag."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_api.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_api.run import RunSpec
from lora_api.training import Quantization
from lora_trainer.adapter import gather_adapter, write_adapter
from lora_trainer.merge import merge_files, plan_merge
from lora_trainer.model import add_adapter, load_base_model
from lora_trainer.settings import Place
from lora_trainer.verify import adapter_parameters, load_published, published_scale

Make = Callable[..., RunSpec]
CPU = torch.device("cpu")
IDS = torch.arange(3, 43).reshape(2, 20)

LORAS: dict[str, dict[str, Any]] = {
    "a rank with a whole root": {"r": 4, "alpha": 8},
    "a rank without one": {"r": 6, "alpha": 8},
    "patterns, each with its own root": {
        "r": 6, "alpha": 8, "rankPattern": {"down_proj": 8, "q_proj": 2}, "alphaPattern": {"self_attn.v_proj": 32}},
    "not rsLoRA": {"r": 6, "alpha": 8, "useRslora": False},
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def load_base(model: Path) -> Any:
    return load_base_model(model, Quantization(type="none"), CPU)


@pytest.fixture(params=LORAS)
def published(
    request: pytest.FixtureRequest, make_run: Make, model: Path, tmp_path: Path
) -> tuple[PeftModel, RunSpec, Path]:
    """A model as the trainer has it, with an adapter as if it had learned, and what is published of it."""
    run = make_run(lora={"useRslora": True, **LORAS[request.param]}, quantization={"type": "none"})
    trained = add_adapter(load_base(model), run.lora, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter, _ in adapter_parameters(trained):
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    write_adapter(gather_adapter(trained), trained, run, tmp_path / "adapter")
    return trained, run, tmp_path / "adapter"


def as_sglang_scales(config: dict[str, Any]) -> float:
    """SGLang's LoRAAdapter: ``lora_alpha / r``, whatever use_rslora says."""
    return float(config["lora_alpha"] / config["r"])


def test_peft_and_a_reader_that_knows_no_rslora_have_the_trainers_own_logits(
    published: tuple[PeftModel, RunSpec, Path], model: Path, tmp_path: Path
) -> None:
    trained, _, directory = published
    own = logits(trained)
    config = json.loads((directory / ADAPTER_CONFIG).read_text())
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert as_sglang_scales(config) == published_scale(config)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load_base(model), directory)), own, rtol=0, atol=1e-6)
    assert float((own - logits(load_base(model))).abs().max()) > 0.01

    tensors = load_file(directory / ADAPTER_WEIGHTS)
    plan = plan_merge(model, {name: (tensor.shape[0], tensor.shape[1]) for name, tensor in tensors.items()})
    ((_, merged),) = ((name, load_file(path)) for name, path in merge_files(
        plan, tensors, as_sglang_scales(config), tmp_path / "merged"))  # fmt: skip
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.load_state_dict(merged, strict=False)
    whole.tie_weights()
    torch.testing.assert_close(logits(whole), own, rtol=0, atol=1e-5)


def test_the_matrices_of_one_rank_are_published_as_they_were_trained_and_loaded_back_to_the_bit(
    published: tuple[PeftModel, RunSpec, Path], model: Path
) -> None:
    trained, run, directory = published
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    if not run.lora.rank_pattern:
        for name, parameter, _ in adapter_parameters(trained):
            assert torch.equal(tensors[name.replace(".default.", ".")], parameter), name
    own = logits(trained)
    again = add_adapter(load_base(model), run.lora, seed=9)
    load_published(again, directory, Place(0, 0, 1), CPU)
    torch.testing.assert_close(logits(again), own, rtol=0, atol=0 if not run.lora.rank_pattern else 1e-6)


def test_an_adapter_of_an_earlier_release_is_still_read(
    published: tuple[PeftModel, RunSpec, Path], model: Path
) -> None:
    """Those have use_rslora and the alpha that was asked for."""
    trained, run, directory = published
    config = json.loads((directory / ADAPTER_CONFIG).read_text())
    rank = run.lora.published_rank
    earlier = config | ({"lora_alpha": run.lora.alpha, "use_rslora": True} if run.lora.use_rslora else {})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(earlier))
    assert published_scale(earlier) == pytest.approx(config["lora_alpha"] / rank, rel=1e-12)
    again = add_adapter(load_base(model), run.lora, seed=9)
    load_published(again, directory, Place(0, 0, 1), CPU)
    torch.testing.assert_close(logits(again), logits(trained), rtol=0, atol=1e-6)
    peft = PeftModel.from_pretrained(load_base(model), directory)
    torch.testing.assert_close(logits(peft), logits(trained), rtol=0, atol=1e-6)
