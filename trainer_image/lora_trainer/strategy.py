"""Which way of training together a run takes, and what each process holds then. Pure; no torch.

``docs/parallelism.md`` says what each way costs.
"""

from dataclasses import dataclass, replace
from typing import Literal

from lora_api.training import Parallelism
from lora_trainer.errors import BadSpecError
from lora_trainer.fitting import choose_shard_size
from lora_trainer.job import Job
from lora_trainer.memory import ALLOCATOR_FACTOR, GIB, gathered_bytes, plan_memory, weight_bytes


@dataclass(frozen=True)
class Strategy:
    """How the base weights are spread: ``replicas`` copies, each over ``shards`` processes.

    Attributes:
        kind: ``alone`` is one process. ``ddp`` holds all weights on each process and averages the adapter's gradients.
            ``fsdp`` (FSDP2) shards them over all processes, ``hsdp`` inside groups of ``shards`` processes.
        replicas: copies of the weights over all processes.
        shards: processes that share one copy. Neighbouring ranks share, so that a group lies inside a node.
        offload: weights, adapter and optimizer are in host memory between their uses.
        reshard: a layer is put back to shards after its forward pass, and gathered again for the backward pass.
        collective_seconds: how long a process waits for the others in one collective operation.
    """

    kind: Literal["alone", "ddp", "fsdp", "hsdp"]
    replicas: int = 1
    shards: int = 1
    offload: bool = False
    reshard: bool = True
    collective_seconds: float = 600.0

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the weights. A mesh of one process shards nothing, but offloads."""
        return self.kind in ("fsdp", "hsdp")

    def part(self, rank: int) -> int:
        """Which of the ``shards`` parts of each weight the process ``rank`` holds."""
        return rank % self.shards


def decide_strategy(parallelism: Parallelism, job: Job | None = None, device_gib: float | None = None) -> Strategy:
    """The strategy for ``parallelism`` on GPUs of ``device_gib`` GiB; ``job`` is the run as the memory plan sees it.

    auto takes the one with the least traffic across nodes that is sure to fit: on one node fsdp; over nodes with more
    than one GPU each hsdp, if the GPUs of one node hold the model, else fsdp. Never ddp: its gain over fsdp is small
    where adapters are trained, and it is the first to run out of memory. Where the memory, or what the run needs of
    it, is not known (``None``), weights are sharded over all processes, and layers never stay gathered.

    Raises:
        BadSpecError: the processes do not divide into groups of shardSize, or fields do not go together. The API server
            refuses these too.
    """
    world = parallelism.world_size
    if parallelism.cpu_offload and parallelism.strategy == "ddp":
        raise BadSpecError("parallelism.cpuOffload needs sharded weights: set strategy to fsdp, hsdp or auto")
    if parallelism.shard_size is not None and parallelism.strategy != "hsdp":
        raise BadSpecError(f"parallelism.shardSize belongs to strategy hsdp, and strategy is {parallelism.strategy}")
    if world == 1:
        return Strategy("fsdp", offload=True) if parallelism.cpu_offload else Strategy("alone")
    if parallelism.strategy == "ddp":
        return Strategy("ddp", replicas=world)
    shards = choose_shard_size(job, parallelism, device_gib)
    if shards == 1 or world % shards:
        raise BadSpecError(
            f"parallelism.shardSize: {world} processes do not divide into groups of {shards}; set a shardSize of 2 or "
            f"more that divides {world}, or strategy: fsdp"
        )
    roomy = job is not None and device_gib is not None and has_room(job, shards, device_gib)
    return Strategy(
        "fsdp" if shards == world else "hsdp",
        replicas=world // shards,
        shards=shards,
        offload=parallelism.cpu_offload,
        reshard=parallelism.cpu_offload or not roomy,
    )


def has_room(job: Job, shards: int, device_gib: float) -> bool:
    """Whether all layers may be whole between forward and backward pass, in place of the few gathered at a time."""
    spread = replace(job, shard_size=shards)
    held = max(0.0, weight_bytes(job) - gathered_bytes(spread))
    return plan_memory(spread).safe + held * ALLOCATOR_FACTOR / GIB <= device_gib
