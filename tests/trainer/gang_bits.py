"""What the processes of ``tests.trainer.gang`` do with packed weights: load, shard, gather, and flip bits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from lora_api.training import LoRA, Quantization
from lora_trainer.errors import WeightsChangedError
from lora_trainer.loading import part_to_load
from lora_trainer.model import add_adapter, load_base_model
from lora_trainer.packed import Packed, find_packed
from lora_trainer.parallel import start_process_group
from lora_trainer.proof import Proof, take_proof
from lora_trainer.settings import read_place
from lora_trainer.sharding import spread_model
from lora_trainer.strategy import Strategy
from tests.support.gputypes import BFLOAT16_NAN, gpu_types

CPU = torch.device("cpu")


def build(model: str, quantization: dict[str, Any], strategy: Strategy) -> tuple[torch.nn.Module, Proof]:
    """A model with an adapter, spread over the processes, and the proof of what was loaded."""
    place, settings = read_place(), Quantization.model_validate(quantization)
    start_process_group(place, CPU, 600, alone_too=strategy.offload)
    base = load_base_model(Path(model), settings, CPU, part_to_load(strategy, place.rank))
    proof = take_proof(base, strategy, place.rank)
    adapted = add_adapter(base, LoRA(), 0)
    spread_model(adapted, strategy, CPU)
    return adapted, proof


def gather_packed(model: str, quantization: dict[str, Any], strategy: dict[str, Any]) -> dict[str, Any]:
    """Packed weights of a model that is loaded whole, and of one that is spread and gathered: which of them differ."""
    with gpu_types():
        whole = load_base_model(Path(model), Quantization.model_validate(quantization), CPU)
        spread, proof = build(model, quantization, Strategy(**strategy))
        proof.check_gathered(spread)
        proof.check_shards()
        gathered = dict(gather_each(spread, proof.weights))
        loaded = {weight.name: weight for weight in find_packed(whole)}
        with torch.no_grad():
            ids = torch.arange(24).view(2, 12) % 7 + 3
            logits = [one.eval()(ids, use_cache=False).logits for one in (whole, spread)]
        proof.check_gathered(spread)
    return {
        "weights": len(loaded),
        "sharded": sum(not weight.is_whole for weight in proof.weights),
        "types": sorted({str(value.dtype) for value in gathered.values()}),
        "patterns": sum(patterns(weight.parameter.data) for weight in loaded.values()),
        "different": sorted(
            name for name, weight in loaded.items() if not torch.equal(weight.parameter.data, gathered[name])
        ),
        "constants": all(
            torch.equal(one, other)
            for mine in proof.weights
            for one, other in zip(mine.constants, loaded[mine.name].constants, strict=True)
        ),
        "logits": float((logits[0] - logits[1]).abs().max()),
    }


def patterns(packed: torch.Tensor) -> int:
    """How many words of 16 bits would be no numbers, were they bfloat16, and not the one that CUDA makes of those."""
    data = packed.contiguous().reshape(-1).view(torch.uint8)
    words = data[: len(data) // 2 * 2].view(torch.bfloat16)
    return int((words.isnan() & (words.view(torch.int16) != BFLOAT16_NAN)).sum())


def gather_each(model: torch.nn.Module, weights: list[Packed]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole of each packed weight, as FSDP2 gathers it. All ranks call it."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for weight in weights:
        holding = [group for group in groups if any(module is weight.module for module in group.modules())]
        if holding:
            holding[-1].unshard()
        yield weight.name, weight.parameter.data.clone()
        if holding:
            holding[-1].reshard()


def flip(model: str, quantization: dict[str, Any], strategy: dict[str, Any], at: int, what: str) -> list[str]:
    """What every check says once one bit has changed on rank ``at``: of a packed weight, or of its constants."""
    spread, proof = build(model, quantization, Strategy(**strategy))
    if read_place().rank == at:
        weight = proof.weights[-1]
        flip_bit(weight.here if what == "weight" else weight.constants[0])
    return [words_of(lambda: proof.check_gathered(spread)), words_of(proof.check_shards)]


def flip_bit(tensor: torch.Tensor, byte: int = 5, bit: int = 3) -> None:
    """Changes one bit of ``tensor``."""
    tensor.detach().reshape(-1).view(torch.uint8)[byte] ^= 1 << bit


def words_of(check: Callable[[], None]) -> str:
    """What ``check`` has found wrong."""
    try:
        check()
    except WeightsChangedError as error:
        return str(error)
    return ""
