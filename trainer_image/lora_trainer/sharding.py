"""Spreading a model over the processes: FSDP2, or whole copies whose adapters learn together. And the proof of it.

FSDP2 is called directly. accelerate would ignore it on CPUs, would take it for granted that all weights are there whole
before they are sharded, and has no place for prefetching; the training loop does not need to know of any of this.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from lora_trainer.architecture import decoder_layers
from lora_trainer.devices import traits
from lora_trainer.errors import InternalError
from lora_trainer.loading import local_part
from lora_trainer.parallel import limit_collectives, sum_over_ranks
from lora_trainer.rows import frozen_weight, row_parameters
from lora_trainer.strategy import Strategy

SHARD_TOLERANCE = 1.25
"""How much more than an even share of the weights a rank may hold. Quantization constants are not sharded."""

Holder = tuple[nn.Module, str]


def spread_model(model: nn.Module, strategy: Strategy, device: torch.device) -> None:
    """Spreads ``model`` over the processes as ``strategy`` says, and proves it.

    Raises:
        InternalError: it is not spread so afterwards.
    """
    if strategy.kind == "ddp":
        for parameter in trainable(model):
            dist.broadcast(parameter.data, src=0)
    if strategy.is_sharded:
        whole = parameter_bytes(model)
        shard_model(model, strategy, device)
        check_sharded(model, whole, strategy)
    elif any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise InternalError(f"parallelism.strategy is {strategy.kind}, but some parameters are distributed")


def shard_model(model: nn.Module, strategy: Strategy, device: torch.device) -> None:
    """FSDP2 in groups: each decoder layer, the embedding, and the final norm with the output head.

    While a layer runs, the next one is gathered. The head stays gathered from forward to backward pass, which begins
    with it; the embedding does not, since nothing before it is trained. Tied, both are one weight and one group.
    The rows of new tokens stay whole.
    """
    mesh = make_mesh(strategy, device)
    # Packed weights are integers, which FSDP2 gathers as they are, whatever the type of the others.
    types = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    low = torch.bfloat16 if torch.bfloat16 in types else None
    common: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=traits(device).pinned_memory)
        if strategy.offload
        else OffloadPolicy(),
        "ignored_params": row_parameters(model),
    }
    layers = decoder_layers(model)
    with filling_shards(model):
        for layer in layers:
            fully_shard(layer, reshard_after_forward=strategy.reshard, **common)
        tail = _shard_ends(model, layers, common)
        fully_shard(model, reshard_after_forward=False, **common)
    _prefetch([*layers, *tail[:1]], layers)
    model.no_sync = partial(_no_sync, model)


def make_mesh(strategy: Strategy, device: torch.device) -> DeviceMesh:
    """The processes as (replicas, shards), or as a row where there is one copy. Neighbouring ranks share a copy."""
    if strategy.replicas == 1:
        return init_device_mesh(device.type, (strategy.shards,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device.type, (strategy.replicas, strategy.shards), mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):
        limit_collectives(mesh.get_group(name), strategy.collective_seconds)
    return mesh


def _shard_ends(model: nn.Module, layers: list[nn.Module], common: dict[str, Any]) -> list[nn.Module]:
    """Shards embedding, final norm and head. Returns the modules of the group that ends the forward pass.

    The loss may take the head's weight without calling the head. The group is gathered when the norm runs, so its
    weight is there.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and frozen_weight(embedding) is frozen_weight(head)
    tail = [module for module in (_final_norm(model, layers), embedding if tied else None, head) if module is not None]
    if not tied:
        fully_shard(embedding, reshard_after_forward=True, **common)
    fully_shard(tail, reshard_after_forward=False, **common)
    return tail


def _final_norm(model: nn.Module, layers: list[nn.Module]) -> nn.Module | None:
    """The last module with weights of its own beside the list of layers; it runs after them."""
    for parent in model.modules():
        children = list(parent.children())
        if any(isinstance(child, nn.ModuleList) and list(child) == layers for child in children):
            found = [child for child in children if list(child.parameters(recurse=False))]
            last = found[-1] if found else None
            return None if last is model.get_input_embeddings() else last
    return None


def _prefetch(forward: list[nn.Module], layers: list[nn.Module]) -> None:
    """While one module runs, the next is gathered: one ahead, so that two layers are whole at a time (memory plan)."""
    for module, following in pairwise(forward):
        if module in layers:
            module.set_modules_to_forward_prefetch([following])
    for before, module in pairwise(layers):
        module.set_modules_to_backward_prefetch([before])


@contextmanager
def filling_shards(model: nn.Module) -> Iterator[None]:
    """Puts the parts that were kept while loading into the shards that are made inside.

    FSDP2 sees stand-ins as parameters on the meta device, of which it makes shards without values.
    """
    holders: dict[int, list[Holder]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if local_part(parameter) is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    parts: list[tuple[list[Holder], torch.Tensor]] = []
    for found in holders.values():
        stand_in = getattr(*found[0])
        parts.append((found, stand_in.local_part))
        empty = nn.Parameter(torch.empty(stand_in.shape, dtype=stand_in.dtype, device="meta"), requires_grad=False)
        _assign(found, empty)
    yield
    while parts:  # so that each part is freed once it is copied
        found, part = parts.pop()
        # Not DTensor.from_local: it would move what is kept in host memory to the mesh's device.
        filled = torch.empty_like(getattr(*found[0]), device=part.device)
        filled.to_local().copy_(part)
        _assign(found, nn.Parameter(filled, requires_grad=False))


def _assign(holders: Iterable[Holder], parameter: nn.Parameter) -> None:
    for module, name in holders:
        setattr(module, name, parameter)


@contextmanager
def _no_sync(model: FSDPModule) -> Iterator[None]:
    """Gradients stay where they are until the last micro-batch of a step. accelerate looks for it by its name."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def reshard(model: nn.Module) -> None:
    """Puts what is still gathered back to shards, after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this process holds. Tied weights count once."""
    total = 0
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total += local.numel() * local.element_size()
    return total


def check_sharded(model: nn.Module, whole: int, strategy: Strategy) -> None:
    """Raises InternalError unless parameters are distributed and this rank's bytes fell from ``whole`` to its share."""
    distributed = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    share = parameter_bytes(model)
    if not distributed or share > whole / strategy.shards * SHARD_TOLERANCE:
        raise InternalError(
            f"FSDP did not shard the model: {distributed} parameters are distributed, and this rank holds {share} of "
            f"{whole} bytes with {strategy.shards} processes"
        )


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over all processes of each gradient of a whole parameter, in one message: all with ddp.

    FSDP2 has done so with those of sharded parameters. A parameter without a gradient here may have one elsewhere (a
    mixture's expert), so it counts as zero.
    """
    own = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not dist.is_initialized() or not own:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [parameter.numel() for parameter in own]
    for parameter, mean in zip(own, flat.split(sizes), strict=True):
        parameter.grad = mean.view_as(parameter)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Averages gradients where that is still to do, and scales them down to the L2 norm ``max_norm`` over all of them.

    All ranks call it after the last micro-batch of a step. Returns the norm before, equal on all ranks; where it is not
    finite nothing is scaled. torch's own function would talk to the other ranks through host memory under CPU offload.
    """
    parameters = trainable(model)
    average_gradients(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = _square(shards)
    sharded = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
    if sharded is not None:
        mesh = sharded.device_mesh
        copies = prod(
            mesh.size(dim) for dim, placement in enumerate(sharded.placements) if isinstance(placement, Replicate)
        )
        square = sum_over_ranks([square], torch.device(mesh.device_type))[0] / copies
    norm = (square + _square(whole)) ** 0.5
    if max_norm < norm < float("inf"):
        for part in (*shards, *whole):
            part.mul_(max_norm / (norm + 1e-6))
    return norm


def _square(parts: list[torch.Tensor]) -> float:
    """The square of the L2 norm over all ``parts``, summed in float64."""
    return float(torch.stack([part.double().square().sum() for part in parts]).sum()) if parts else 0.0
