"""publish.mergeBase: the whole model with the adapter merged into its original weights, W + scale * B A.

The original weights are read anew from the base model's files. Those that the run trained on were quantized, and a
model that is merged from them carries the quantization's error for ever. The files are merged one by one: memory holds
one of them at a time, disk one merged one. Products are float32; the result is in the type that the file has.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lora_api.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST_FILE,
    MergedManifest,
    StoredFile,
    adapter_prefix,
    merged_directory,
)
from lora_api.run import RunSpec
from lora_trainer.adapter import matrix_names, model_name
from lora_trainer.chat import template_files
from lora_trainer.errors import BadSpecError, InternalError, StoreUnavailableError
from lora_trainer.newtokens import tokenizer_files
from lora_trainer.publish import has_manifest
from lora_trainer.store import Store, describe_file, join
from lora_trainer.verify import published_scale

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CARD_FILE = "README.md"
PLAIN_TYPES = {"F64", "F32", "F16", "BF16"}
"""Types of safetensors to which a product can be added. All others are quantized."""

KEPT_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
"""Files of the base model that the merged one needs too: configuration, tokenizer, chat template."""

PEFT_PREFIX = "base_model.model."

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class MergePlan:
    """Which tensors of which files change.

    ``files`` are the names of the base model's weight files. ``modules`` has, by the tensor's name in its file, the
    adapter's name of the module that it is the weight of.
    """

    base: Path
    files: list[str]
    modules: dict[str, str]


def check_mergeable(run: RunSpec, base: Path, shapes: Shapes) -> None:
    """Finds out before training whether the merge can be done after it. Reads headers only.

    Raises:
        BadSpecError: publish.mergeBase is set and cannot be done.
    """
    if run.publish.merge_base:
        plan_merge(base, shapes)


def plan_merge(base: Path, shapes: Shapes) -> MergePlan:
    """The plan for the model in ``base`` and an adapter whose matrices have ``shapes``, by PEFT's names.

    Raises:
        BadSpecError: the weight of an adapted module is in no file, or not as a plain matrix of the module's shape.
    """
    files = find_weight_files(base)
    places, kinds, tied = _read_places(base, files)
    modules = {}
    for module, shape in _weight_shapes(shapes).items():
        name = f"{module.removeprefix(PEFT_PREFIX)}.weight"
        found = places.get(name)
        if found is None and name == tied:
            continue  # its rows are those of the embedding
        if found is None:
            raise BadSpecError(
                f"publish.mergeBase: the files of baseModel have no tensor of its own for {module}, so the adapter "
                "cannot be merged into them; leave mergeBase out, or take this module from lora.targetModules"
            )
        kind, have = kinds[found]
        if kind not in PLAIN_TYPES:
            raise BadSpecError(
                f"publish.mergeBase: baseModel's {found} is stored as {kind}, which is quantized; use the original, "
                "unquantized model"
            )
        if have != shape:
            raise BadSpecError(
                f"publish.mergeBase: baseModel's {found} has shape {have} and the adapter of it {shape}; leave "
                "mergeBase out"
            )
        modules[found] = module
    return MergePlan(base, files, modules)


def find_weight_files(base: Path) -> list[str]:
    """Names of the weight files that transformers would load, sorted.

    Raises:
        BadSpecError: there are none.
    """
    index = base / INDEX_FILE
    if index.exists():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if (base / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    raise BadSpecError(f"publish.mergeBase: baseModel has neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def merge_files(
    plan: MergePlan, tensors: Mapping[str, torch.Tensor], scale: float, scratch: Path
) -> Iterator[tuple[str, Path]]:
    """Writes each merged weight file to ``scratch``: its name, and where it is until the next one is asked for.

    Raises:
        InternalError: a merged weight is not finite.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    for name in plan.files:
        merged = {}
        with safe_open(plan.base / name, framework="pt") as shard:
            metadata = shard.metadata() or {"format": "pt"}
            for key in shard.keys():  # noqa: SIM118 - not a dict
                weight = shard.get_tensor(key)
                module = plan.modules.get(key)
                merged[key] = weight if module is None else _merge(key, weight, module, tensors, scale)
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(merged, target, metadata=metadata)
        merged.clear()
        yield name, target
        target.unlink()


def publish_merged(
    store: Store,
    run: RunSpec,
    adapter: Path,
    base: Path,
    digest: str,
    card: str,
    alive: Callable[[], None],
) -> None:
    """Merges the adapter in the directory ``adapter`` into the model in ``base`` and uploads the result.

    ``digest`` is the adapter's, ``card`` the merged model's README.md. ``alive`` is called after each file, so that a
    merge of hours does not look like one that hangs. Cut at any point, it leaves no manifest.

    Raises:
        InternalError: a merged weight is not finite.
        StoreUnavailableError: an object is not there in full size after its upload.
    """
    target = join(adapter_prefix(run.namespace, run.adapter_name), merged_directory(digest))
    if has_manifest(store, target):
        return
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    scale = published_scale(json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    plan = plan_merge(base, {name: (int(t.shape[0]), int(t.shape[1])) for name, t in tensors.items()})
    scratch = adapter.parent / "merged"
    files: list[StoredFile] = []

    def put(name: str, source: Path) -> None:
        store.upload(source, join(target, name))
        files.append(describe_file(source, name))
        alive()

    for name, source in merge_files(plan, tensors, scale, scratch):
        put(name, source)
    written = {CARD_FILE: card, **tokenizer_files(run, base), **template_files(run.dataset.chat_template)}
    for name in list_kept_files(base):
        if name not in written:
            put(name, base / name)
    for name, text in written.items():
        (scratch / name).write_text(text, encoding="utf-8")
        put(name, scratch / name)
    check_sizes(store, target, files)
    manifest = MergedManifest(
        adapter_digest=digest,
        name=run.adapter_name,
        namespace=run.namespace,
        base_model=model_name(run.base_model.uri),
        base_model_revision=run.base_model.revision,
        files=sorted(files, key=lambda file: file.path),
        created_at=datetime.now(UTC),
    )
    store.create(join(target, MANIFEST_FILE), json.dumps(manifest.to_wire(), indent=1).encode())


def check_sizes(store: Store, target: str, files: Iterable[StoredFile]) -> None:
    """Raises StoreUnavailableError unless each of ``files`` is below ``target`` in its full size."""
    sizes = store.sizes(target)
    for file in files:
        path = join(target, file.path)
        if sizes.get(path) != file.size:
            raise StoreUnavailableError(
                f"{store.url(path)}: {file.size} bytes were uploaded, and the store has {sizes.get(path, 'nothing')}"
            )


def list_kept_files(base: Path) -> list[str]:
    """Names of the files that are copied as they are. Indices of weights in other formats are left out."""
    return sorted(
        path.name
        for path in base.iterdir()
        if path.is_file()
        and path.suffix in KEPT_SUFFIXES
        and (path.name == INDEX_FILE or not path.name.endswith(".index.json"))
    )


def _weight_shapes(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Shape of the weight of each module with both matrices: (outputs, inputs); an embedding's: (tokens, outputs)."""
    found = {}
    for module in sorted({name.partition(".lora_")[0] for name in shapes}):
        a, b = (shapes[name] for name in matrix_names(module, shapes))
        embedding = f"{module}.lora_embedding_A" in shapes
        found[module] = (a[1], b[0]) if embedding else (b[0], a[1])
    return found


def _read_places(
    base: Path, files: list[str]
) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]], str | None]:
    """Where each parameter is: by its name in the model, its name in the files; and the type and shape of the latter.

    Also the name of the output head's weight, if it is that of the embedding.

    They are not always the same name: files keep those of the code that wrote them, and transformers renames while it
    loads. What it also splits or joins has no tensor of its own, and is left out.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = skeleton.state_dict()
    tied = next(iter(skeleton.all_tied_weights_keys), None)
    places, kinds = {}, {}
    for file in files:
        with safe_open(base / file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_slice(key)
                kinds[key] = (str(part.get_dtype()), tuple(part.get_shape()))
                name, converted = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, state)
                if converted is None:
                    places[name] = key
    return places, kinds, tied


def _merge(
    key: str, weight: torch.Tensor, module: str, tensors: Mapping[str, torch.Tensor], scale: float
) -> torch.Tensor:
    a, b = (tensors[name].to(torch.float32) for name in matrix_names(module, tensors))
    left, right = (a.T, b.T) if f"{module}.lora_embedding_A" in tensors else (b, a)
    merged = torch.addmm(weight.to(torch.float32), left, right, alpha=scale).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise InternalError(f"publish.mergeBase: {key} is not finite once the adapter is merged into it")
    return merged
