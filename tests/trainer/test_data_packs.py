"""Packing and batches: no document sees another, and no way of putting them together changes loss or gradient."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError
from lora_trainer.launch import free_port
from lora_trainer.packs import Layout, Sequences, check_isolation, choose_layout, collate, flash_arguments, pack
from lora_trainer.sampler import EpochSampler
from lora_trainer.sft import make_micro_batch
from lora_trainer.tokens import Document, make_document
from tests.trainer import gradients

Make = Callable[..., RunSpec]
CPU = torch.device("cpu")
VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral, window of 5": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma3, window of 5 in one of two layers": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
}


class Held(list[Document]):
    """Documents in memory."""

    @property
    def lengths(self) -> Any:
        return np.asarray([len(document.ids) for document in self], dtype=np.int32)


def make_documents(*lengths: int) -> Held:
    """Random documents whose second half is learned."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Held(make_document(ids, [(len(ids) // 2, len(ids))]) for ids in tokens)


def make_network(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    return model


def run_model(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Logits, and the sum of the losses of all learned tokens."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).double(), targets, ignore_index=-100, reduction="sum"
    )
    return logits, float(loss)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_a_pack_has_the_logits_and_the_loss_that_it_has_alone(name: str, attention: str) -> None:
    model, documents = make_network(name, attention), make_documents(9, 7, 12, 1, 16)
    alone = [run_model(model, collate([[document]], "padded", 0)) for document in documents]
    total = sum(loss for _, loss in alone)
    rows = [[documents[0], documents[1], documents[3]], [documents[2], documents[4]]]
    layouts: tuple[Layout, ...] = ("packed", "flat")
    for layout in layouts:
        batch = collate(rows, layout, 0)
        logits, loss = run_model(model, batch)
        found, place = [], {}
        for number, row in enumerate(rows):
            start = sum(len(document.ids) for document in rows[0]) if number and layout == "flat" else 0
            for document in row:
                line = 0 if layout == "flat" else number
                found.append(logits[line, start : start + len(document.ids)])
                place[id(document)] = found[-1]
                start += len(document.ids)
        for document, (expected, _) in zip(documents, alone, strict=True):
            torch.testing.assert_close(place[id(document)], expected[0], atol=1e-5, rtol=0)
        assert loss == pytest.approx(total, abs=1e-4)
        assert int((batch["labels"][:, 1:] != -100).sum()) == sum(document.supervised for document in documents)
    padded = collate([[document] for document in documents], "padded", 0)
    assert run_model(model, padded)[1] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_keeps_documents_apart_is_let_through(name: str) -> None:
    model = make_network(name, "sdpa").train()
    layouts: tuple[Layout, ...] = ("padded", "packed")
    for layout in layouts:
        check_isolation(model, layout, VOCABULARY, CPU)
    assert model.training


def test_a_model_that_mixes_documents_is_refused() -> None:
    model = make_network("llama", "sdpa")
    plain = model.forward
    model.forward = lambda position_ids, **rest: plain(attention_mask=torch.ones_like(rest["input_ids"]), **rest)
    check_isolation(model, "padded", VOCABULARY, CPU)
    with pytest.raises(BadSpecError, match=r"dataset\.packing: this model sees the other records"):
        check_isolation(model, "packed", VOCABULARY, CPU)


def test_the_layout_follows_the_attention() -> None:
    cases: list[tuple[str, bool, Layout]] = [
        ("sdpa", False, "padded"), ("sdpa", True, "packed"), ("eager", True, "packed"),
        ("flash_attention_2", False, "flat"), ("flash_attention_3", True, "flat"),
    ]  # fmt: skip
    for attention, packed, layout in cases:
        assert choose_layout(attention, packed=packed) == layout


def test_flash_attention_is_told_where_documents_begin() -> None:
    batch = make_micro_batch([list(make_documents(3, 1)), list(make_documents(4))], "flat", 0)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 8]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (4, 4)
    assert flash_arguments(batch)["cu_seq_lens_k"].tolist() == [0, 3, 4, 8]  # type: ignore[union-attr]
    assert make_micro_batch([list(make_documents(3, 1)), list(make_documents(9))], "packed", 0)["tokens"] == 13


def test_packs_are_full_and_hold_every_document_once() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 512, 3000).astype(np.int32)
    chosen = np.flatnonzero(generator.random(3000) < 0.9)
    order, bounds = pack(lengths, chosen, 1024, seed=5, window=1000)
    assert sorted(order.tolist()) == chosen.tolist()
    sums = np.add.reduceat(lengths[order], bounds[:-1])
    assert sums.max() <= 1024
    assert sums.mean() > 0.99 * 1024
    again = pack(lengths, chosen, 1024, seed=5, window=1000)
    assert (again[0].tolist(), again[1].tolist()) == (order.tolist(), bounds.tolist())
    assert pack(lengths, chosen, 1024, seed=6)[0].tolist() != order.tolist()
    exact = pack(np.full(4, 8, dtype=np.int32), np.arange(4), 16, seed=0)
    assert exact[1].tolist() == [0, 2, 4]
    documents = make_documents(3, 4, 5)
    sequences = Sequences(documents, np.array([2, 0, 1]), np.array([0, 2, 3]))
    assert sequences.lengths.tolist() == [8, 4]
    assert [document.ids.tolist() for document in sequences[0]] == [documents[i].ids.tolist() for i in (2, 0)]


def test_lengths_are_sorted_inside_a_global_batch_and_move_nothing_out_of_it() -> None:
    lengths = [(index * 37) % 101 for index in range(50)]
    plain, by_length = list(EpochSampler(50, 8, 3)), list(EpochSampler(50, 8, 3, lengths))
    padding = {}
    for name, order in (("plain", plain), ("sorted", by_length)):
        rows = [[lengths[index] for index in order[start : start + 2]] for start in range(0, 48, 2)]
        padding[name] = sum(max(row) * 2 - sum(row) for row in rows)
    for start in range(0, 48, 8):
        batch = by_length[start : start + 8]
        assert set(batch) == set(plain[start : start + 8])
        assert [lengths[index] for index in batch] == sorted((lengths[index] for index in batch), reverse=True)
    assert padding["sorted"] < padding["plain"] / 2


@pytest.fixture(scope="module")
def written(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Losses and gradients of all cases on one process and on two, which start once for all of them."""
    directory = tmp_path_factory.mktemp("gradients")
    found = {}
    for world in (1, 2):
        port = str(free_port())
        command = [sys.executable, "-m", "tests.trainer.gradients", str(model), str(data), str(directory / str(world))]
        env = gradients.environment(world, port)
        started = [subprocess.Popen(command, env=env | {"RANK": str(rank)}) for rank in range(world)]
        assert [process.wait(300) for process in started] == [0] * world
        found[world] = torch.load(directory / str(world) / "gradients.pt")
    return found


@pytest.mark.parametrize("case", gradients.CASES)
def test_processes_and_micro_batches_do_not_change_loss_and_gradient(
    case: str, written: dict[int, dict[str, Any]]
) -> None:
    reference = written[1]["packing, micro-batch 1" if "packing" in case else "micro-batch 1"]
    for world in (1, 2):
        result = written[world][case]
        assert result["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert result["records"] == reference["records"]
        assert set(result["gradients"]) == set(reference["gradients"])
        for name, expected in reference["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], expected, atol=1e-5, rtol=0)
        assert max(float(gradient.abs().max()) for gradient in result["gradients"].values()) > 1e-3


def test_pods_with_other_records_end_with_bad_data(written: dict[int, dict[str, Any]]) -> None:
    assert "the pods read different records: rank 1" in json.dumps(written[2]["other records"])
