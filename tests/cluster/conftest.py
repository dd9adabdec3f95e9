"""A real cluster with the real images and the operator from its chart, once for all tests here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import devcluster
from demo import stack
from demo.model import make_model
from demo.stack import Store
from devcluster import Cluster
from tests.cluster.runs import Runs

Install = Callable[..., None]
NAMESPACE = "lora-tests"
TINY_MODEL = "base/tiny-llama"
TINY_DATA = "data/tiny"


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster; left up for the next time (``make cluster-down`` ends it)."""
    return devcluster.up()


@pytest.fixture(scope="session")
def images(cluster: Cluster) -> dict[str, Any]:
    """Chart values that name the images, which are on the nodes."""
    return stack.load_images(cluster)


@pytest.fixture(scope="session")
def install(cluster: Cluster, images: dict[str, Any]) -> Install:
    """Installs the operator with changed chart values; called without any, as the tests want it: without preflight."""

    def install(**values: Any) -> None:
        stack.install_operator(cluster, {**images, "operator.preflight": False, **values})

    install()
    return install


@pytest.fixture(scope="module")
def preflight(install: Install) -> Iterator[None]:
    """The operator as the chart has it: each run is looked at before its first attempt."""
    install(**{"operator.preflight": True})
    yield
    install()


@pytest.fixture(scope="session")
def store(cluster: Cluster) -> Store:
    return Store(cluster)


@pytest.fixture(scope="session")
def tiny_data(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A random Llama of two layers, with good rows and a file that has one bad row, in the store."""
    upload_tiny_data(store, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def runs(cluster: Cluster, install: Install, store: Store, tiny_data: None) -> Iterator[Runs]:
    """Submits runs into the tests' namespace and removes them after the test."""
    stack.make_namespace(cluster, NAMESPACE)
    runs = Runs(cluster, store, NAMESPACE)
    yield runs
    runs.remove()


def upload_tiny_data(store: Store, directory: Path) -> None:
    """Puts the tiny model and its rows into ``store``."""
    make_tiny_model(directory / "model")
    store.upload(directory / "model", TINY_MODEL)
    rows = [{"prompt": f"say {number}", "completion": f" {number} it is"} for number in range(200)]
    write_rows(directory / "data" / "good.jsonl", rows)
    write_rows(directory / "data" / "bad.jsonl", [*rows[:6], {"prompt": "no completion"}, *rows[6:]])
    marked = [{**row, "prompt": f"<issue_start>{row['prompt']}"} for row in rows]
    write_rows(directory / "data" / "marked.jsonl", marked)
    store.upload(directory / "data", TINY_DATA)


def make_tiny_model(directory: Path) -> None:
    """A Llama of 2 layers with random weights, and the tokenizer of the demo's model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_model(stack.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(stack.MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
