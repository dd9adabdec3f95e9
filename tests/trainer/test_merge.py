"""publish.mergeBase: the merged model is base plus adapter, from the original weights, whole or not there."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from lora_api.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MergedManifest, adapter_prefix, merged_directory
from lora_api.run import RunSpec
from lora_trainer.adapter import expected_shapes
from lora_trainer.errors import BadSpecError, InternalError, StoreUnavailableError
from lora_trainer.merge import check_mergeable, check_sizes, list_kept_files, merge_files, plan_merge, publish_merged
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.stop import StopRequest
from lora_trainer.store import Store, describe_file, split_uri
from lora_trainer.train import train

Make = Callable[..., RunSpec]
DIGEST = "sha256:" + "a" * 64
IDS = torch.arange(3, 35).reshape(2, 16)


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def resave(source: Path, target: Path, *, dtype: torch.dtype = torch.float32, shard: str = "40KB") -> Path:
    """The tiny model again: in several files, in another type."""
    load(source).to(dtype).save_pretrained(target, max_shard_size=shard)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def adapt(base: Path, directory: Path, targets: list[str] | str = "all-linear", **options: Any) -> PeftModel:
    """A random adapter of the model in ``base``, saved as published adapters are, and the model with it."""
    torch.manual_seed(1)
    model = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(directory)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def merge(run: RunSpec, base: Path, adapter: Path) -> Path:
    """Publishes the merged model to the run's store, which is a directory. Returns the merged model's."""
    store = Store(run.publish.store)
    publish_merged(store, run, adapter, base, DIGEST, "card", lambda: None)
    path = f"{adapter_prefix(run.namespace, run.adapter_name)}/{merged_directory(DIGEST)}"
    return Path("/" + split_uri(store.url(path))[1].lstrip("/"))


def test_a_merged_model_of_several_files_answers_as_base_and_adapter(
    make_run: Make, model: Path, tmp_path: Path
) -> None:
    base = resave(model, tmp_path / "base")
    adapted = adapt(base, tmp_path / "adapter")
    merged = merge(make_run(), base, tmp_path / "adapter")
    expected = logits(adapted)
    assert float((expected - logits(load(base))).abs().max()) > 0.1, "the adapter must matter"
    assert torch.allclose(logits(load(merged)), expected, atol=1e-5)

    index = json.loads((merged / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert {key: file for file in files for key in load_file(merged / file)} == index["weight_map"]
    sizes = [t.numel() * t.element_size() for file in files for t in load_file(merged / file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert "lm_head.weight" not in index["weight_map"], "tied embeddings stay tied"
    for name in list_kept_files(base):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        list_kept_files(base)
    )
    assert AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    manifest = MergedManifest.model_validate_json((merged / "manifest.json").read_text())
    assert manifest.adapter_digest == DIGEST
    there = sorted(path.name for path in merged.iterdir() if path.name != "manifest.json")
    assert [file.path for file in manifest.files] == there
    assert all(describe_file(merged / file.path, file.path) == file for file in manifest.files)


def test_a_model_that_was_trained_with_another_template_is_merged_with_it(
    make_run: Make, model: Path, tmp_path: Path
) -> None:
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    base = resave(model, tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    merged = merge(make_run(dataset={"chatTemplate": template}), base, tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(base).chat_template != template
    assert AutoTokenizer.from_pretrained(merged).chat_template == template
    manifest = MergedManifest.model_validate_json((merged / "manifest.json").read_text())
    assert [file.path for file in manifest.files].count("chat_template.jinja") == 1
    assert all(describe_file(merged / file.path, file.path) == file for file in manifest.files)


def test_products_are_float32_and_the_files_keep_their_type(make_run: Make, model: Path, tmp_path: Path) -> None:
    base = resave(model, tmp_path / "base", dtype=torch.bfloat16, shard="1GB")
    adapt(base, tmp_path / "adapter", use_rslora=True)
    merged = load_file(merge(make_run(), base, tmp_path / "adapter") / "model.safetensors")
    adapter, original = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS), load_file(base / "model.safetensors")
    assert set(merged) == set(original)
    changed = 0
    for name, weight in original.items():
        module = "base_model.model." + name.removesuffix(".weight")
        expected = weight
        if f"{module}.lora_A.weight" in adapter:
            a, b = (adapter[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
            exact = weight.double() + 8 / 4**0.5 * (b @ a)
            assert float((merged[name].double() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8
            expected = exact.float().to(torch.bfloat16)
            changed += 1
            assert float((merged[name] != expected).float().mean()) < 1e-3, "rounded once, from float32"
        else:
            assert torch.equal(merged[name], expected)
        assert merged[name].dtype == torch.bfloat16
    assert changed == 14


def tiny_mixtral(directory: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


def test_experts_that_are_stored_one_by_one_stay_and_attention_is_merged(make_run: Make, tmp_path: Path) -> None:
    base = tiny_mixtral(tmp_path / "base")
    keys = load_file(base / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in keys, "files have other names than the model"
    adapted = adapt(base, tmp_path / "adapter", ["q_proj", "k_proj", "v_proj", "o_proj"])
    merged = load(merge(make_run(), base, tmp_path / "adapter"))
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    with pytest.raises(BadSpecError, match=r"publish\.mergeBase.*no tensor of its own for base_model"):
        plan_merge(base, {
            "base_model.model.model.layers.0.mlp.experts.lora_A.weight": (4, 32),
            "base_model.model.model.layers.0.mlp.experts.lora_B.weight": (48, 4),
        })  # fmt: skip


def test_a_base_whose_files_lack_the_prefix_of_the_language_model(make_run: Make, model: Path, tmp_path: Path) -> None:
    base = resave(model, tmp_path / "base")
    inner = resave(model, tmp_path / "inner", shard="1GB")
    weights = {key.removeprefix("model."): tensor for key, tensor in load_file(inner / "model.safetensors").items()}
    save_file(weights, inner / "model.safetensors", metadata={"format": "pt"})
    adapted = adapt(base, tmp_path / "adapter")
    merged = merge(make_run(), inner, tmp_path / "adapter")
    assert set(load_file(merged / "model.safetensors")) == set(weights)
    assert torch.allclose(logits(load(merged)), logits(adapted), atol=1e-5)


class KilledError(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_a_merge_killed_at_any_write_leaves_no_manifest_and_the_next_one_finishes(
    make_run: Make, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    base = resave(model, tmp_path / "base", shard="400KB")
    adapt(base, tmp_path / "adapter")
    store, real = Store(run.publish.store), obstore.put
    for cut in count(1):
        writes = count(1)

        def put(*arguments: Any, cut: int = cut, writes: Any = writes, **options: Any) -> Any:
            if next(writes) == cut:
                raise KilledError
            return real(*arguments, **options)

        monkeypatch.setattr(obstore, "put", put)
        try:
            merge(run, base, tmp_path / "adapter")
        except KilledError:
            assert not [path for path in store.sizes() if path.endswith("manifest.json")]
        else:
            break
    manifest = MergedManifest.model_validate_json(store.get(f"tests/tiny/{merged_directory(DIGEST)}/manifest.json"))
    assert cut == len(manifest.files) + 2, "each file and the manifest were cut off once"
    before = store.sizes()
    monkeypatch.setattr(obstore, "put", None)  # whatever is whole is not written again
    merge(run, base, tmp_path / "adapter")
    assert store.sizes() == before


def test_one_file_at_a_time_is_on_the_disk(model: Path, tmp_path: Path) -> None:
    base = resave(model, tmp_path / "base")
    shapes = expected_shapes(adapt(base, tmp_path / "adapter"))
    tensors = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    plan = plan_merge(base, shapes)
    seen = [
        sorted(path.name for path in (tmp_path / "s").iterdir())
        for _ in merge_files(plan, tensors, 2.0, tmp_path / "s")
    ]
    assert seen == [[name] for name in plan.files]
    assert list((tmp_path / "s").iterdir()) == []


def break_index(base: Path) -> None:
    for path in base.glob("*.safetensors"):
        path.unlink()


def quantize(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")


def reshape(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].T.contiguous()}, base / "model.safetensors")


def lose(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors")


BASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (break_index, "neither model.safetensors nor"),
    "quantized weights": (quantize, "q_proj.weight is stored as F8_E4M3.*unquantized model"),
    "a matrix of another shape": (reshape, "up_proj.weight has shape"),
    "a matrix that is not there": (lose, "no tensor of its own for base_model.model.model.layers.1.mlp.up_proj"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_merged_is_refused_before_training(
    case: str, make_run: Make, model: Path, tmp_path: Path
) -> None:
    base = resave(model, tmp_path / "base", shard="1GB")
    shapes = expected_shapes(adapt(base, tmp_path / "adapter"))
    run = make_run(publish={"mergeBase": True})
    check_mergeable(run, base, shapes)
    breaks, words = BASES[case]
    breaks(base)
    with pytest.raises(BadSpecError, match=rf"publish\.mergeBase.*{words}"):
        check_mergeable(run, base, shapes)
    check_mergeable(make_run(), base, shapes)


def test_a_merge_that_overflows_and_an_upload_that_is_cut_off_are_found(
    make_run: Make, model: Path, tmp_path: Path
) -> None:
    base = resave(model, tmp_path / "base", dtype=torch.float16, shard="1GB")
    adapt(base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    (tmp_path / "adapter" / ADAPTER_CONFIG).write_text(json.dumps({**config, "lora_alpha": 10_000_000}))
    with pytest.raises(InternalError, match=r"mergeBase: model\.layers.*not finite"):
        merge(make_run(), base, tmp_path / "adapter")
    store, file = Store(f"file://{tmp_path}/short"), base / "config.json"
    store.put("a/config.json", file.read_bytes()[:-1])
    with pytest.raises(StoreUnavailableError, match=r"a/config\.json"):
        check_sizes(store, "a", [describe_file(file, "config.json")])


def test_a_run_publishes_the_merge_of_the_original_weights_and_not_of_the_quantized_ones(
    make_run: Make, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / "start"))
    run = make_run(publish={"mergeBase": True}, training={"learningRate": 0.05})
    adapter = train(run, Place(0, 0, 1), StopRequest(), Progress(enabled=False))
    assert adapter is not None
    assert adapter.merged_uri == adapter.uri.replace("/sha256-", "/merged/sha256-")
    directory, merged = (Path("/" + split_uri(uri)[1].lstrip("/")) for uri in (adapter.uri, adapter.merged_uri))
    assert not (directory / "merged").exists()
    whole = logits(load(merged))
    original = PeftModel.from_pretrained(load(model), directory).eval()
    assert torch.allclose(whole, logits(original), atol=1e-5)
    from lora_trainer.model import load_base_model

    quantized = PeftModel.from_pretrained(load_base_model(model, run.quantization, torch.device("cpu")), directory)
    assert float((whole - logits(quantized.eval())).abs().max()) > 1e-2, "nf4 is far from the original"
    again = train(run.model_copy(update={"attempt": 2}), Place(0, 0, 1), StopRequest(), Progress(enabled=False))
    assert again == adapter
