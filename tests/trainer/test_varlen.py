"""Packed rows without a mask: when, the same losses and gradients as with one, and no document that sees another."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as library
from transformers import AutoModelForCausalLM

from bench.gpu import packing
from bench.gpu.models import random_base_model, write_model
from lora_api.training import Quantization
from lora_trainer import varlen
from lora_trainer.errors import BadSpecError, InternalError
from lora_trainer.packs import Layout, check_isolation, choose_layout, collate
from lora_trainer.sft import make_micro_batch
from lora_trainer.varlen import VARLEN, AttentionNeeds, read_needs, settle_packing, use_varlen, why_dense
from tests.support import varlen as reference
from tests.support.families import FAMILIES, build_config
from tests.trainer.test_data_packs import Held, make_documents

CPU = torch.device("cpu")
H100, A100, RTX_4090, T4 = (9, 0), (8, 0), (8, 9), (7, 5)
PLAIN = AttentionNeeds()

CHOICES: dict[str, tuple[AttentionNeeds, tuple[int, int], bool, str | None]] = {
    "a Llama on an H100": (PLAIN, H100, True, None),
    "on an A100": (PLAIN, A100, True, None),
    "on an RTX 4090": (PLAIN, RTX_4090, True, None),
    "on a T4": (PLAIN, T4, True, "compute capability is 7.5"),
    "in float32": (PLAIN, H100, False, "computeDtype"),
    "windows": (replace(PLAIN, kinds=frozenset({"full_attention", "sliding_attention"})), H100, True, None),
    "chunks": (replace(PLAIN, kinds=frozenset({"chunked_attention"})), H100, True, "layers of chunked_attention"),
    "a soft cap": (replace(PLAIN, softcap=True), H100, True, "attn_logit_softcapping"),
    "dropout": (replace(PLAIN, dropout=True), H100, True, "attention_dropout"),
    "seen from both sides": (replace(PLAIN, causal=False), H100, True, "not causal"),
    "latent attention": (replace(PLAIN, even=False), H100, True, "differ in size"),
    "its own attention": (replace(PLAIN, dispatched=False), H100, True, "cannot be exchanged"),
    "no attention that is found": (replace(PLAIN, head_sizes=frozenset()), H100, True, "cannot be exchanged"),
    "heads of 256": (replace(PLAIN, head_sizes=frozenset({256})), A100, True, None),
    "heads of 256 on a smaller chip": (replace(PLAIN, head_sizes=frozenset({256})), RTX_4090, True, "8 up to 192"),
    "heads of 256 on an RTX 5090": (replace(PLAIN, head_sizes=frozenset({256})), (12, 0), True, "8 up to 192"),
    "heads of 512 in some layers": (replace(PLAIN, head_sizes=frozenset({256, 512})), H100, True, "head size is 512"),
    "heads of 20": (replace(PLAIN, head_sizes=frozenset({20})), H100, True, "head size is 20"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_a_mask_is_made_only_where_the_kernel_cannot_do_without(case: str) -> None:
    needs, capability, half, words = CHOICES[case]
    found = why_dense(needs, capability, half=half)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = build_config(family)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, 64)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


DENSE = {"gemma-2": "attn_logit_softcapping"}
"""Families that need a mask, and why."""


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_needs_is_read_from_its_modules(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(family))
    needs = read_needs(model)
    assert needs.head_sizes == {32 if family == "smollm-2" else 16}
    found = why_dense(needs, H100, half=True)
    assert (DENSE.get(family) or "") in str(found)
    assert (found is None) == (family not in DENSE)


def losses_and_gradient(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each learned token by its label and place, and the gradient of the embedding's weight."""
    labels = batch["labels"]
    arguments = {name: one for name, one in batch.items() if name not in ("labels", "tokens")}
    logits = model(**arguments, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="none"
    )
    weight = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    return losses[losses != 0].detach(), gradient


@pytest.fixture
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", reference.varlen_attn)


def rows(documents: Held) -> list[list[Any]]:
    return [[documents[0], documents[1]], [documents[2], documents[3], documents[4]]]


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - DENSE.keys()))
def test_losses_and_gradients_are_those_of_the_mask(family: str) -> None:
    """Documents longer than the windows (16) and shorter, in one row each for the kernel and in two for the mask."""
    model, documents = build(family), make_documents(33, 7, 20, 1, 12)
    model.set_attn_implementation("sdpa")
    want, slope = losses_and_gradient(model, make_micro_batch(rows(documents), "packed", 0))
    use_varlen(model)
    found, other = losses_and_gradient(model, make_micro_batch(rows(documents), "flat", 0))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, slope, atol=1e-4, rtol=1e-4)
    assert float(slope.abs().max()) > 0.01


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("family", ["llama-3", "mistral", "gemma-3"])
def test_rows_of_one_document_go_to_sdpa_as_before(family: str) -> None:
    model, documents = build(family), make_documents(33, 7, 20)
    batch = collate([[document] for document in documents], "padded", 0)
    model.set_attn_implementation("sdpa")
    want, _ = losses_and_gradient(model, batch)
    answer = {"input_ids": batch["input_ids"][:1, :20], "attention_mask": batch["attention_mask"][:1, :20]}
    expected = model.generate(**answer, max_new_tokens=4, do_sample=False)
    use_varlen(model)
    found, _ = losses_and_gradient(model, batch)
    assert torch.equal(found, want)
    assert torch.equal(model.generate(**answer, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.usefixtures("_kernel")
def test_a_flat_row_that_does_not_say_where_documents_begin_is_no_long_document() -> None:
    model = build("llama-3")
    use_varlen(model)
    batch = make_micro_batch([list(make_documents(5, 6))], "flat", 0)
    with pytest.raises(InternalError, match="does not say where its documents begin"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("asked", [{"softcap": 2.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_what_the_kernel_does_not_have_is_never_left_out(asked: dict[str, Any]) -> None:
    heads = torch.zeros(1, 4, 6, 8)
    borders = {"cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32), "max_length_q": 6}
    with pytest.raises(InternalError, match=f"asks for {next(iter(asked))}, which varlen_attn does not have"):
        varlen.varlen_attention(torch.nn.Module(), heads, heads, heads, None, **borders, **asked)


@pytest.mark.parametrize("family", ["llama-3", "mistral", "gemma-3"])
def test_a_kernel_that_crosses_borders_is_found_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    use_varlen(model)
    monkeypatch.setattr(varlen, "varlen_attn", reference.varlen_attn)
    check_isolation(model, "flat", 64, CPU)

    def ignore_borders(*arguments: Any, **rest: Any) -> torch.Tensor:
        query, key, value, bounds, *_ = arguments
        whole, length = bounds[[0, -1]], int(bounds[-1])
        return reference.varlen_attn(query, key, value, whole, whole, length, length, **rest)

    monkeypatch.setattr(varlen, "varlen_attn", ignore_borders)
    with pytest.raises(BadSpecError, match=r"dataset\.packing: this model sees the other records"):
        check_isolation(model, "flat", 64, CPU)


SETTLED: dict[str, tuple[str, str, tuple[int, int] | None, bool, str, Layout, str | None]] = {
    "on a GPU": ("llama-3", "sdpa", H100, True, VARLEN, "flat", None),
    "on a CPU": ("llama-3", "sdpa", None, False, "sdpa", "packed", None),
    "a soft cap": ("gemma-2", "eager", H100, True, "eager", "packed", "squashes its attention scores"),
    "an old GPU": ("llama-3", "sdpa", T4, True, "sdpa", "packed", "compute capability is 7.5"),
}


@pytest.mark.parametrize("case", SETTLED)
def test_packing_settles_attention_and_layout_and_says_why_a_mask_is_made(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family, before, capability, half, after, layout, words = SETTLED[case]
    model = build(family)
    model.set_attn_implementation(before)
    settle_packing(model, capability, half=half, say=True)
    assert model.config._attn_implementation == after
    assert choose_layout(after, packed=True) == layout
    assert choose_layout(after, packed=False) == "padded"
    said = capsys.readouterr().err
    assert said.count("dataset.packing: attention takes a mask") == (words is not None)
    assert words is None or words in said
    settle_packing(model, capability, half=half, say=False)
    assert capsys.readouterr().err == ""


def test_the_kernels_stand_in_has_its_signature_and_its_shapes() -> None:
    def names(function: Any) -> list[tuple[str, Any, Any]]:
        return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]

    assert names(reference.varlen_attn) == names(library.varlen_attn)
    shapes, bounds = ((11, 4, 8), (11, 2, 8), (11, 2, 8)), [0, 4, 11]
    window = {"window_size": (2, 0), "enable_gqa": True, "scale": 0.5}
    heads = [torch.randn(shape) for shape in shapes]
    borders = torch.tensor(bounds, dtype=torch.int32)
    found = reference.varlen_attn(*heads, borders, borders, 7, 7, **window)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(one) for one in (*heads, borders)]
        want = library.varlen_attn(*fakes, fakes[-1], 7, 7, **window)
    assert isinstance(want, torch.Tensor)
    assert (found.shape, found.dtype) == (want.shape, want.dtype)


@pytest.mark.usefixtures("_kernel")
def test_the_gpu_benchmark_compares_the_kernel_with_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "model", "tiny")
    model = random_base_model(directory, Quantization(type="none"), CPU, attention="sdpa")
    row = packing.make_row(200)
    assert sum(len(document.ids) for document in row) == 200
    found = packing.compare_packing(model, row, CPU)
    assert "failed" not in found
    assert found["gradientDifference"] < 1e-4
    assert found["secondsWithMask"] > 0 < found["secondsWithKernel"]
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *_, **__: torch.zeros_like(query))
    assert "is varlen_attn right here?" in packing.compare_packing(model, row, CPU)["failed"]
