"""accelerate gets no model of ours, every pass is under one autocast, and a run ends where that is not so."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from lora_trainer.errors import InternalError
from lora_trainer.precision import autocast_forward
from lora_trainer.untouched import MARK, check_same_model, kept_from_accelerate
from tests.support.families import build_config

CPU = torch.device("cpu")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One that puts what it prepares under autocast."""
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_gives_a_marked_model_back_as_it_is(accelerator: Accelerator) -> None:
    ours, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with kept_from_accelerate(ours):
        assert accelerator.prepare(ours, torch.optim.SGD(ours.parameters()))[0] is ours
    assert "forward" not in vars(ours)
    accelerator.prepare(other)
    assert "forward" in vars(other), "the mark is what keeps accelerate off"


def test_a_run_ends_where_accelerate_no_longer_heeds_the_mark(accelerator: Accelerator) -> None:
    model = nn.Sequential(nn.Linear(2, 2))

    def prepare() -> None:
        with kept_from_accelerate(model):
            delattr(model, MARK)
            accelerator.prepare(model)

    with pytest.raises(InternalError, match=r"wrapped the model or changed its forward pass.*another version"):
        prepare()


def test_a_run_ends_where_a_module_inside_was_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InternalError, match="wrapped the model"), kept_from_accelerate(model):
        model[0] = nn.Sequential(model[0])


def test_a_run_ends_where_the_loop_gets_another_model() -> None:
    model = nn.Linear(2, 2)
    check_same_model(model, model)
    with pytest.raises(InternalError, match="was wrapped in Sequential"):
        check_same_model(nn.Sequential(model), model)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_every_pass_is_under_autocast_to_the_type_of_products(products: torch.dtype) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(build_config("llama-3")).eval()
    seen: list[bool] = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    autocast_forward(model, products, CPU)
    ids = torch.tensor([[3, 4, 5]])
    logits = model(ids).logits
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert set(seen) == {products == torch.bfloat16}
    assert logits.dtype == products
    assert not torch.is_autocast_enabled("cpu"), "and nothing outside of it is"
