"""How the processes of a gang work together: process group, FSDP2 (also on CPUs), and proof that it shards."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor

from lora_trainer.architecture import decoder_layers
from lora_trainer.errors import InternalError
from lora_trainer.settings import Place, rendezvous_seconds

FSDP_ARGUMENTS: dict[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT",
}
"""FSDP2, one group a transformer layer. Low-memory loading is not there for 4-bit weights: every rank loads all."""

SHARD_TOLERANCE = 1.25
"""How much more than an even share of the weights a rank may hold. Quantization constants are not sharded."""


def start_process_group(
    place: Place, device: torch.device, timeout_seconds: float, store: Callable[[], dist.Store] | None = None
) -> None:
    """Meets the other processes, through ``store`` or through MASTER_ADDR. One process alone needs no group.

    ``timeout_seconds`` is how long a process waits for the others in one collective operation. This comes before the
    training arguments are made: with them the timeout would be ignored on CPUs.

    Raises:
        torch.distributed.DistError: the others did not appear in time.
    """
    if place.world_size == 1:
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=rendezvous_seconds()),
        device_id=device if device.type == "cuda" else None,
        **({"store": store(), "rank": place.rank, "world_size": place.world_size} if store else {}),
    )
    dist.barrier()
    group = dist.distributed_c10d._get_default_group()  # noqa: SLF001 - torch has no public call for it
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)  # noqa: SLF001


def use_fsdp(accelerator: Accelerator, fsdp_arguments: dict[str, Any]) -> None:
    """Makes accelerate use FSDP2. On CPUs it ignores the plugin and would train with plain DDP, without a word."""
    state = accelerator.state
    if state.distributed_type == DistributedType.FSDP:
        return
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**fsdp_arguments)


def shard_model(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """Shards ``model`` over all processes and proves it.

    Raises:
        InternalError: the model was not sharded.
    """
    if accelerator.num_processes == 1:
        return model
    whole = parameter_bytes(model)
    classes = {type(layer).__name__ for layer in decoder_layers(model)}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(classes)
    sharded = fsdp2_prepare_model(accelerator, model)
    check_sharded(sharded, whole, accelerator.num_processes)
    return sharded


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters that this process holds. Tied weights count once."""
    total = 0
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total += local.numel() * local.element_size()
    return total


def check_sharded(model: torch.nn.Module, whole: int, processes: int) -> None:
    """Raises InternalError unless parameters are distributed and this rank's bytes fell from ``whole`` to its share."""
    distributed = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    share = parameter_bytes(model)
    if not distributed or share > whole / processes * SHARD_TOLERANCE:
        raise InternalError(
            f"FSDP did not shard the model: {distributed} parameters are distributed, and this rank holds {share} of "
            f"{whole} bytes with {processes} processes"
        )


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of ``parameter``, on the CPU. A collective operation where it is sharded: all ranks call it."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().to("cpu", copy=True)


def assign_full(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Puts the whole ``value`` into ``parameter``; each rank keeps its part. No communication."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            local = _local_part(parameter, value.to(parameter.device, parameter.dtype))
            parameter.to_local().copy_(local)
        else:
            parameter.copy_(value)


def _local_part(like: DTensor, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sums of ``values`` over all processes, in float64."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any process."""
    return sum_over_ranks([float(flag)], device)[0] > 0
