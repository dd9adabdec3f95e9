"""A run as the memory plan sees it, the largest micro-batch that fits, and what would make a run fit. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_api.finetune import LoRAFineTuneSpec
from lora_api.run import RunSpec
from lora_api.training import Parallelism, Training
from lora_trainer.job import CPU, TRAINER, Job
from lora_trainer.memory import MemoryPlan, plan_memory
from lora_trainer.modelshape import ModelShape, Weights

MAX_GPUS = 512
MAX_MICRO_BATCH = 1024
SHORTEST_SEQUENCE = 256
"""Shorter sequences than this are no advice."""


@dataclass(frozen=True)
class Suggestion:
    """A change of the specification, by field, with which the run fits; and its plan."""

    changes: dict[str, int | bool | str]
    plan: MemoryPlan

    def to_text(self) -> str:
        """For people, without the figure."""
        return ", ".join(f"{field}: {_yaml(value)}" for field, value in self.changes.items())


def _yaml(value: int | bool | str) -> str:
    return str(value).lower()


def build_job(
    spec: RunSpec | LoRAFineTuneSpec,
    shape: ModelShape,
    *,
    counted: Weights | None = None,
    longest: int | None = None,
    device_gib: float | None = None,
) -> Job:
    """The run of ``spec`` as far as memory goes. A micro-batch that is still ``auto`` counts as one sequence.

    ``longest`` is the number of tokens of the longest record, where it is known: no batch is longer. ``device_gib`` is
    what strategy auto is chosen for.
    """
    training, parallelism, on_cpu = spec.training, spec.parallelism, spec.parallelism.gpus_per_node == 0
    quantization = spec.quantization
    if on_cpu and quantization.compute_dtype == "auto":
        quantization = quantization.model_copy(update={"compute_dtype": "float32"})
    limit = spec.dataset.max_seq_length
    job = Job(
        shape=shape,
        lora=spec.lora,
        quantization=quantization,
        micro_batch=1 if training.micro_batch_size == "auto" else training.micro_batch_size,
        sequence=limit if longest is None or spec.dataset.packing else max(1, min(limit, longest)),
        world_size=parallelism.world_size,
        gradient_checkpointing=training.gradient_checkpointing,
        stack=CPU if on_cpu else TRAINER,
        cpu_offload=parallelism.cpu_offload,
        objective=training.objective,
        optimizer=training.optimizer,
        packed=spec.dataset.packing,
        counted=counted,
    )
    return replace(job, shard_size=choose_shard_size(job, parallelism, device_gib))


def settle(training: Training, job: Job, device_gib: float | None) -> tuple[Job | None, str]:
    """``job`` with its micro-batch settled, and what is wrong with it, in a sentence with the remedies.

    auto: the largest that fits, and ``None`` with the reason where not even one sequence does. A size that the user
    chose stays, with a warning where it does not fit. Without ``device_gib`` auto is 1, which is safe wherever
    anything is.
    """
    auto = training.micro_batch_size == "auto"
    if device_gib is None:
        return job, "training.microBatchSize: auto is 1: how much memory there is, is not known" if auto else ""
    if auto and (best := largest_fitting(job, training.global_batch_size, device_gib)) is not None:
        return best, ""
    plan = plan_memory(job)
    if plan.fits(device_gib):
        return job, ""
    where = "a process" if job.stack.host else "a GPU"
    batch = f"{job.micro_batch} x {job.sequence} tokens"
    problem = (
        f"training.microBatchSize: {f'not even {batch} fit' if auto else f'{batch} do not fit'}: {where} needs "
        f"{plan.safe:.2f} GiB to be safe, and has {device_gib:.2f} GiB"
    )
    return (None if auto else job), f"{problem}; {describe_remedies(job, training, device_gib)}"


def describe_remedies(job: Job, training: Training, device_gib: float) -> str:
    """What makes ``job`` fit, the cheapest first, in one line."""
    found = suggest(job, training.global_batch_size, device_gib)
    if not found:
        return "nothing less than a smaller model or more memory makes it fit"
    return "it fits with one of these, the cheapest first: " + " | ".join(one.to_text() for one in found)


def choose_shard_size(job: Job | None, parallelism: Parallelism, device_gib: float | None) -> int:
    """Processes that share one copy of the weights of ``job``; ``None``: what it needs is not known.

    auto: those of one node, over nodes with several GPUs each where a node holds the model with room to train one
    sequence at a time (hsdp); else all of them (fsdp). Where the GPU's memory is not known, all of them.
    """
    if parallelism.strategy == "ddp":
        return 1
    if parallelism.strategy == "hsdp":
        return parallelism.shard_size or parallelism.processes_per_node
    node = parallelism.processes_per_node
    several = parallelism.strategy == "auto" and parallelism.nodes > 1 and node > 1
    if several and job is not None and device_gib is not None:
        alone = replace(job, micro_batch=1, shard_size=node)
        return node if plan_memory(alone).fits(device_gib) else parallelism.world_size
    return parallelism.world_size


def micro_batches(global_batch_size: int, world_size: int) -> list[int]:
    """The micro-batch sizes that divide the batch of each GPU, from the largest; none if W does not divide it."""
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        return []
    return [size for size in range(min(share, MAX_MICRO_BATCH), 0, -1) if share % size == 0]


def largest_fitting(job: Job, global_batch_size: int, device_gib: float, at_most: int = MAX_MICRO_BATCH) -> Job | None:
    """``job`` with the largest micro-batch that fits with margin; ``None`` if not even one sequence does."""
    for size in micro_batches(global_batch_size, job.world_size):
        candidate = replace(job, micro_batch=size)
        if size <= at_most and plan_memory(candidate).fits(device_gib):
            return candidate
    return None


def suggest(job: Job, global_batch_size: int, device_gib: float) -> list[Suggestion]:
    """What to change, cheapest first.

    For a job that fits: the largest micro-batch, if that is larger, since larger ones are faster. For one that does not
    fit: a smaller micro-batch (the same result, slower), sharded weights, more GPUs, gradient checkpointing (a fifth
    slower), shorter sequences (another result), each with the largest micro-batch up to the one asked for. What costs
    more than a smaller micro-batch is listed only where it allows a larger one than that, and cpuOffload, the slowest,
    only where nothing else helps. Empty: nothing of this helps.
    """
    if plan_memory(job).fits(device_gib):
        best = largest_fitting(job, global_batch_size, device_gib)
        return [_describe(job, best)] if best is not None and best.micro_batch > job.micro_batch else []
    smaller = largest_fitting(job, global_batch_size, device_gib, job.micro_batch)
    found = [] if smaller is None else [_describe(job, smaller)]
    reached = 0 if smaller is None else smaller.micro_batch
    for candidates in _remedies(job, global_batch_size):
        for candidate in candidates:
            best = largest_fitting(candidate, global_batch_size, device_gib, job.micro_batch)
            if best is not None and best.micro_batch > reached:
                found.append(_describe(job, best))
                break
    if not found and not job.cpu_offload and not job.stack.host:
        offloaded = replace(job, cpu_offload=True, gradient_checkpointing=True, shard_size=None)
        best = largest_fitting(offloaded, global_batch_size, device_gib, job.micro_batch)
        return [] if best is None else [_describe(job, best)]
    return found


def _remedies(job: Job, global_batch_size: int) -> Iterator[Iterator[Job]]:
    sharded = job if job.shards == job.world_size else replace(job, shard_size=None)
    if sharded is not job:
        yield iter([sharded])
    yield (
        replace(sharded, world_size=world, shard_size=None)
        for world in range(job.world_size + 1, min(MAX_GPUS, global_batch_size) + 1)
        if world % job.world_size == 0 and global_batch_size % world == 0
    )
    lean = [replace(one, gradient_checkpointing=True) for one in (job, sharded)]
    if not job.gradient_checkpointing:
        yield iter(lean)
    yield (replace(one, sequence=length) for length in _shorter(job.sequence) for one in lean)


def _shorter(sequence: int) -> Iterator[int]:
    length = 1 << (sequence - 1).bit_length() - 1
    while length >= SHORTEST_SEQUENCE:
        yield length
        length //= 2


def _describe(job: Job, changed: Job) -> Suggestion:
    fields: dict[str, tuple[int | bool | str, int | bool | str]] = {
        "training.microBatchSize": (job.micro_batch, changed.micro_batch),
        "parallelism.strategy": (_strategy(job), _strategy(changed)),
        "training.gradientCheckpointing": (job.gradient_checkpointing, changed.gradient_checkpointing),
        _world_field(job): (job.world_size, changed.world_size),
        "dataset.maxSeqLength": (job.sequence, changed.sequence),
        "parallelism.cpuOffload": (job.cpu_offload, changed.cpu_offload),
    }
    if job.world_size == 1:  # more GPUs than one are sharded by default
        del fields["parallelism.strategy"]
    return Suggestion({name: new for name, (old, new) in fields.items() if new != old}, plan_memory(changed))


def _world_field(job: Job) -> str:
    return "parallelism.nodes" if job.stack.host else "parallelism.nodes * parallelism.gpusPerNode"


def _strategy(job: Job) -> str:
    if job.shards == job.world_size > 1:
        return "fsdp"
    return "ddp" if job.shards == 1 else "hsdp"
