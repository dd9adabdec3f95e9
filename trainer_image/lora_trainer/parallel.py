"""How the processes of a gang talk: the process group, whole tensors from shards and back, sums and votes."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_api.run import RunSpec
from lora_trainer.devices import traits
from lora_trainer.fitting import build_job
from lora_trainer.groups import all_groups, open_host_group
from lora_trainer.modelshape import UnplannedModelError, read_shape
from lora_trainer.settings import Place, rendezvous_seconds
from lora_trainer.strategy import Strategy, decide_strategy


def choose_strategy(run: RunSpec, model: Path, available_gib: float | None) -> Strategy:
    """The strategy for ``run`` with so many GiB for each process; config.json is in the directory ``model``.

    All ranks call it with the same memory and so decide alike. CPUs, and models that the memory plan does not know, are
    sharded over all processes.

    Raises:
        BadSpecError: fields of ``parallelism`` do not go together.
    """
    strategy = _decide(run, model, available_gib)
    return replace(strategy, collective_seconds=run.parallelism.collective_timeout_seconds)


def _decide(run: RunSpec, model: Path, available_gib: float | None) -> Strategy:
    if run.parallelism.gpus_per_node == 0:
        return decide_strategy(run.parallelism)
    try:
        shape = read_shape(json.loads((model / "config.json").read_text(encoding="utf-8")))
    except UnplannedModelError:
        return decide_strategy(run.parallelism)
    return decide_strategy(run.parallelism, build_job(run, shape, device_gib=available_gib), available_gib)


def start_process_group(
    place: Place,
    device: torch.device,
    timeout_seconds: float,
    store: Callable[[], dist.Store] | None = None,
    *,
    alone_too: bool = False,
) -> None:
    """Meets the other processes, through ``store`` or through MASTER_ADDR.

    One process alone needs no group but with ``alone_too``: FSDP2 offloads in one of one. ``timeout_seconds`` is how
    long a process waits for the others in one collective operation. This comes before the training arguments are
    made: with them the timeout would be ignored on CPUs. On GPUs host memory has a group of its own (``groups``).

    Raises:
        torch.distributed.DistError: the others did not appear in time.
    """
    backends, patience = traits(device).backends, timedelta(seconds=rendezvous_seconds())
    if place.world_size == 1:
        if alone_too:
            dist.init_process_group(backends.device, store=dist.HashStore(), rank=0, world_size=1)
            open_host_group(backends.host, patience)
        return
    dist.init_process_group(
        backends.device,
        timeout=patience,
        device_id=device if backends.bound else None,
        **({"store": store(), "rank": place.rank, "world_size": place.world_size} if store else {}),
    )
    open_host_group(backends.host, patience)
    dist.barrier()
    for group in all_groups():
        limit_collectives(group, timeout_seconds)


def limit_collectives(group: dist.ProcessGroup, seconds: float) -> None:
    """From now on, a process that is missing for ``seconds`` in a collective operation of ``group`` counts as lost."""
    timeout = timedelta(seconds=seconds)
    dist.distributed_c10d._set_pg_timeout(timeout, group)  # noqa: SLF001 - torch has no public call for it


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of ``parameter``, on the CPU. A collective operation where it is sharded: all ranks call it.

    Offloaded shards are gathered on the mesh's device, where the other ranks expect them.
    """
    if isinstance(parameter, DTensor):
        parameter = parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
    return parameter.detach().to("cpu", copy=True)


def assign_full(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Puts the whole ``value`` into ``parameter``; each rank keeps its part. No communication."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            cut = distribute_tensor(
                value.to(parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(cut.to_local())
        else:
            parameter.copy_(value)


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
