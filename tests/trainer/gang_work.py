"""What the processes of ``tests.trainer.gang`` do. Every function takes and gives what JSON can hold."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

import lora_trainer.train
from lora_api.run import RunSpec
from lora_api.training import Quantization
from lora_trainer import exchange
from lora_trainer.errors import InternalError
from lora_trainer.loading import part_to_load
from lora_trainer.model import load_base_model
from lora_trainer.parallel import full_tensor, start_process_group
from lora_trainer.progress import Progress
from lora_trainer.settings import read_place
from lora_trainer.sharding import parameter_bytes, shard_model, spread_model
from lora_trainer.stop import StopRequest
from lora_trainer.strategy import Strategy, decide_strategy

CPU = torch.device("cpu")


class Recorder(Progress):
    """Keeps the losses in place of printing them, on each rank."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.losses: dict[int, float] = {}
        self.norms: dict[int, float] = {}
        self.evals: dict[int, float] = {}

    def report_step(self, **fields: Any) -> None:
        self.losses[fields["step"]] = fields["loss"]
        self.norms[fields["step"]] = fields["grad_norm"]

    def report_eval(self, **fields: Any) -> None:
        self.evals[fields["step"]] = fields["eval_loss"]


def train(run: dict[str, Any], directory: str, *, roomy: bool = False) -> dict[str, Any]:
    """Trains and publishes as the pods do. Returns losses, and how the parameters lay once they were spread.

    ``roomy``: as on GPUs with room to keep every layer gathered until its backward pass.
    """
    place, progress = read_place(), Recorder()
    os.environ["LORA_STATE_DIR"] = f"{directory}/state"
    spread: dict[str, Any] = {}

    def spread_and_look(model: nn.Module, strategy: Strategy, device: torch.device) -> None:
        spread["whole"] = parameter_bytes(model)
        spread_model(model, strategy, device)
        spread["local"], spread["strategy"] = parameter_bytes(model), asdict(strategy)
        spread["base"], spread["trained"] = layout(model, requires_grad=False), layout(model, requires_grad=True)

    lora_trainer.train.spread_model = spread_and_look
    lora_trainer.train.choose_strategy = lambda run, *_: replace(decide_strategy(run.parallelism), reshard=not roomy)
    adapter = lora_trainer.train.train(RunSpec.model_validate(run), place, StopRequest(), progress)
    return {
        "losses": progress.losses,
        "norms": progress.norms,
        "evals": progress.evals,
        "adapter": adapter.uri if adapter else None,
        **spread,
    }


def layout(model: nn.Module, *, requires_grad: bool) -> list[str]:
    """How the parameters are spread: their placements and the mesh, or ``whole``."""
    return sorted(
        {
            f"{parameter.placements} of {tuple(parameter.device_mesh.shape)}"
            if isinstance(parameter, DTensor)
            else "whole"
            for parameter in model.parameters()
            if parameter.requires_grad == requires_grad
        }
    )


def exchange_json(values: list[Any], *, strays: dict[str, str] | None = None, longest: int = 1000) -> list[Any]:
    """What each rank gathers from ``values``, and is told by rank 0. A rank in ``strays`` sends those bytes (hex)."""
    place = read_place()
    start_process_group(place, CPU, 600)
    exchange.MAX_BYTES = longest
    stray = (strays or {}).get(str(place.rank))
    found: list[Any] = []
    for usual, raw in (
        (exchange.gather_json, exchange.gather_bytes),
        (exchange.broadcast_json, exchange.broadcast_bytes),
    ):
        try:
            said = usual(values[place.rank]) if stray is None else raw(bytes.fromhex(stray))
        except InternalError as error:
            said = str(error)
        found.append(said if stray is None else None)
    return found


def load_both_ways(model: str) -> dict[str, Any]:
    """Loads a model whole, and part by part into shards; compares bits of weights and of logits."""
    place = read_place()
    strategy = Strategy("fsdp", shards=place.world_size)
    start_process_group(place, CPU, 600)
    whole = load_base_model(Path(model), Quantization(), CPU)
    parts = load_base_model(Path(model), Quantization(), CPU, part_to_load(strategy, place.rank))
    shard_model(parts, strategy, CPU)
    ids = torch.arange(24).view(2, 12) % 7 + 3
    with torch.no_grad():
        logits = [one(ids).logits for one in (whole, parts)]
    for module in parts.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    expected, found = dequantized(whole), dequantized(parts)
    return {
        "quantized": sum(isinstance(module, Linear4bit) for module in parts.modules()),
        "names": sorted(expected) == sorted(found),
        "different": [name for name, value in expected.items() if not torch.equal(value, found[name])],
        "logits": torch.equal(*logits),
        "tied": parts.get_input_embeddings().weight is parts.get_output_embeddings().weight,
        "share": parameter_bytes(parts) / parameter_bytes(whole),
    }


def dequantized(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every weight as the matrix products see it, whole. All ranks call it."""
    found = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            value = full_tensor(parameter)
            if isinstance(module, Linear4bit) and kind == "weight":
                value = dequantize_4bit(value, module.quant_state)
            found[f"{name}.{kind}"] = value
    return found


def load_and_weigh(model: str, warm_up: str, quantization: str) -> dict[str, Any]:
    """Memory of loading, in bytes: by how much it grew at most, for the parts of one of two processes and for all."""
    place, settings = read_place(), Quantization(type=quantization)
    part = part_to_load(Strategy("fsdp", shards=2), place.rank)
    load_base_model(Path(warm_up), settings, CPU)
    grown = {}
    for name, kept in (("parts", part), ("whole", None)):
        gc.collect()
        with peak_of_memory() as peak:
            loaded = load_base_model(Path(model), settings, CPU, kept)
        grown[name] = peak()
        grown["bytes"] = parameter_bytes(loaded)
        del loaded
    return grown


@contextmanager
def peak_of_memory() -> Iterator[Callable[[], int]]:
    """The most that the process's own memory (without mapped files) grew, seen whenever a module gets a weight."""
    seen = [resident()]

    def look(*_: object) -> None:
        seen.append(resident())

    handle = register_module_parameter_registration_hook(look)
    try:
        yield lambda: max(seen) - seen[0]
    finally:
        look()
        handle.remove()


def resident() -> int:
    """Bytes of memory of this process that are not pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel says nothing about RssAnon")
