"""Proof that the store holds what was trained: the files are read back, loaded into the model, and evaluated again.

A digest alone would prove that the upload worked, not that the files are right: an adapter with the names of one
library and the scale of another is whole, and wrong. So the model that was evaluated in memory gets the weights of the
downloaded files, at the scale that the downloaded configuration states, and must reach the same loss.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from lora_api.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, StoredFile
from lora_trainer.adapter import ADAPTER, ROUNDING
from lora_trainer.errors import InternalError
from lora_trainer.parallel import assign_full
from lora_trainer.rows import find_rows, read_rows
from lora_trainer.seal import Seal
from lora_trainer.settings import Place, publish_seconds
from lora_trainer.store import Store, describe_file, join

TOLERANCE = 1e-3
"""Largest difference of the two losses, as a share of the loss (at least of 1 nat). The weights are equal to the bit;
what is left is the order in which a GPU adds."""


@dataclass(frozen=True)
class Verification:
    """Evaluation losses (nats per token) in memory and of the files in the store; ``None`` without records."""

    in_memory: float | None
    from_store: float | None


def verify_published(
    model: PeftModel,
    fetch: Callable[[], Path],
    evaluate: Callable[[], float | None],
    in_memory: float | None,
    place: Place,
    device: torch.device,
    seal: Seal,
) -> Verification:
    """Loads what ``fetch`` brings from the store into ``model``, and evaluates it. All ranks call it.

    Only rank 0 calls ``fetch``. The others wait for it outside of any collective operation, whose time limit is made
    for a step of training and not for an upload.

    Raises:
        InternalError: the files are not what was trained.
        torch.distributed.DistStoreError: rank 0 did not appear within LORA_PUBLISH_SECONDS.
    """
    directory = fetch() if place.is_main else None
    wait_for_main("adapter in the store", place, publish_seconds(), seal)
    load_published(model, directory, place, device)
    return compare(in_memory, evaluate())


def compare(in_memory: float | None, from_store: float | None) -> Verification:
    """Both losses.

    Raises:
        InternalError: they differ by more than ``TOLERANCE``.
    """
    if in_memory is not None and from_store is not None:
        allowed = TOLERANCE * max(1.0, abs(in_memory))
        if not abs(in_memory - from_store) <= allowed:
            raise InternalError(
                f"the adapter in the store has the evaluation loss {from_store:.6f}, and {in_memory:.6f} in memory: "
                "its files are not what was trained, so no version was published"
            )
    return Verification(in_memory, from_store)


def fetch_files(store: Store, prefix: str, files: Iterable[StoredFile], directory: Path) -> Path:
    """Downloads ``files`` below ``prefix`` to ``directory``.

    Raises:
        InternalError: the store gives other bytes than were put there.
    """
    for file in files:
        path, target = join(prefix, file.path), directory / file.path
        store.download(path, target)
        found = describe_file(target, file.path)
        if found != file:
            raise InternalError(
                f"{store.url(path)}: the store gives {found.size} bytes with the SHA-256 {found.sha256}, and "
                f"{file.size} bytes with {file.sha256} were uploaded: it damages what it holds. No version was "
                "published"
            )
    return directory


def wait_for_main(what: str, place: Place, seconds: float, seal: Seal) -> None:
    """Returns on all ranks once rank 0 has come here, without a collective operation.

    Rank 0 says so under a name that only the run's processes can make.

    Raises:
        torch.distributed.DistStoreError: not within ``seconds``.
        torch.distributed.DistNetworkError: rank 0 has ended.
    """
    if place.world_size == 1:
        return
    board = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public call for it
    name = seal.name("done", 0, what)
    if place.is_main:
        board.set(name, "")
    else:
        board.wait([name], timedelta(seconds=seconds))


def load_published(model: PeftModel, directory: Path | None, place: Place, device: torch.device) -> None:
    """Puts the adapter in ``directory``, which only rank 0 has, into ``model``. All ranks call it.

    Raises:
        InternalError: a weight is missing, has another shape, or belongs to nothing in the model.
    """
    saved = load_file(directory / ADAPTER_WEIGHTS) if directory else {}
    scale = published_scale(json.loads((directory / ADAPTER_CONFIG).read_text())) if directory else 1.0
    for name, parameter, live_scale in adapter_parameters(model):
        value = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
        if place.is_main:
            key = name.replace(f".{ADAPTER}.", ".")
            if key not in saved:
                raise InternalError(f"the adapter in the store has no {key}")
            same = math.isclose(scale, live_scale, rel_tol=ROUNDING)
            factor = scale / live_scale if ".lora_B." in name and not same else 1.0
            value.copy_(take(key, saved.pop(key), parameter.shape) * factor)
        if place.world_size > 1:
            dist.broadcast(value, src=0)
        assign_full(parameter, value)
    learned = find_rows(model)
    if learned is not None:
        values = torch.zeros(2, *learned.embedding.rows.shape, device=device)
        if place.is_main:
            values = torch.stack(read_rows(learned, saved, scale)).to(device)
            saved = {name: tensor for name, tensor in saved.items() if name not in learned.shapes}
        if place.world_size > 1:
            dist.broadcast(values, src=0)
        for module, value in zip((learned.embedding, learned.head), values, strict=True):
            assign_full(module.rows, value)
    if saved:
        raise InternalError(f"the adapter in the store has weights of nothing in the model: {sorted(saved)[:3]}")


def take(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The part of a published matrix that the model has: a rank that was filled up with zeros is cut off again.

    Raises:
        InternalError: it is too small, or what is cut off is not zero.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.dim() != len(shape) or any(have < need for have, need in zip(tensor.shape, shape, strict=True)):
        raise InternalError(f"the adapter in the store has {name} as {tuple(tensor.shape)} instead of {tuple(shape)}")
    part = tensor[tuple(slice(size) for size in shape)]
    if int(tensor.count_nonzero()) != int(part.count_nonzero()):
        raise InternalError(f"the adapter in the store has more rows in {name} than the model trained")
    return part


def published_scale(config: dict[str, float]) -> float:
    """What B A is multiplied by, as every reader of adapter_config.json computes it.

    Adapters of earlier releases have use_rslora.
    """
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def adapter_parameters(model: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter, float]]:
    """Name, parameter and scale of every adapter matrix in ``model``, in the same order on every rank."""
    scales = {
        name: float(module.scaling[ADAPTER])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling
    }
    for name, parameter in model.named_parameters():
        module, separator, _ = name.partition(".lora_")
        if separator:
            yield name, parameter, scales[module]
