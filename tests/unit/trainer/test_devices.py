"""What is decided by the kind of a device: types, copies and groups."""

import ast
from pathlib import Path

import pytest
import torch

import lora_trainer
from lora_trainer.devices import TRAITS, Backends, product_type, traits
from lora_trainer.errors import BadSpecError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
PRODUCTS = {
    ("auto", "cpu"): torch.float32,
    ("float32", "cpu"): torch.float32,
    ("auto", "cuda"): torch.bfloat16,
    ("bfloat16", "cuda"): torch.bfloat16,
    ("float32", "cuda"): torch.float32,
}


@pytest.mark.parametrize(("asked", "kind"), PRODUCTS)
def test_the_type_of_products(asked: str, kind: str) -> None:
    assert product_type(asked, torch.device(kind)) == PRODUCTS[asked, kind]


def test_bfloat16_on_a_cpu_is_refused() -> None:
    with pytest.raises(BadSpecError, match=r"quantization.computeDtype bfloat16 needs GPUs"):
        product_type("bfloat16", CPU)


BACKENDS = {
    "cuda": Backends("nccl", host="gloo", bound=True),
    "cpu": Backends("gloo"),
}


@pytest.mark.parametrize("kind", TRAITS)
def test_the_groups_of_each_kind_of_device(kind: str) -> None:
    assert traits(torch.device(kind)).backends == BACKENDS[kind]


@pytest.mark.parametrize("kind", TRAITS)
def test_a_group_that_is_split_has_one_backend(kind: str) -> None:
    backends = TRAITS[kind].backends
    assert ":" not in backends.device
    assert (backends.host is None) == (backends.device == "gloo"), "gloo takes tensors of a CPU, NCCL none"


def test_what_is_exchanged_goes_through_the_group_of_host_memory() -> None:
    source = (Path(lora_trainer.__file__).parent / "exchange.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    collectives = [call for call in calls if ast.unparse(call.func) in ("dist.broadcast", "dist.all_gather")]
    assert len(collectives) == 3
    for call in collectives:
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}["group"] == "host_group()"
