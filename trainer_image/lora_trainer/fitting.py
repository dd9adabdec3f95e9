"""What would make a run fit: the largest micro-batch, and the cheapest changes, in the order of their cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_trainer.memory import Job, MemoryPlan, plan_memory

MAX_GPUS = 512
MAX_MICRO_BATCH = 1024
SHORTEST_SEQUENCE = 256
"""Shorter sequences than this are no advice."""


@dataclass(frozen=True)
class Suggestion:
    """A change of the specification, by field, with which the run fits; and its plan."""

    changes: dict[str, int | bool]
    plan: MemoryPlan

    def to_text(self) -> str:
        """For people, without the figure."""
        return ", ".join(f"{field}: {_yaml(value)}" for field, value in self.changes.items())


def _yaml(value: int | bool) -> str:
    return str(value).lower()


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
    fit: a smaller micro-batch (the same result, slower), gradient checkpointing (a fifth slower), more GPUs, shorter
    sequences (another result), each with the largest micro-batch up to the one asked for. Something costlier is listed
    only where it allows a larger micro-batch than what is cheaper. Empty: nothing of this helps.
    """
    if plan_memory(job).fits(device_gib):
        best = largest_fitting(job, global_batch_size, device_gib)
        return [_describe(job, best)] if best is not None and best.micro_batch > job.micro_batch else []
    found: list[Suggestion] = []
    reached = 0
    for candidates in _remedies(job, global_batch_size):
        for candidate in candidates:
            best = largest_fitting(candidate, global_batch_size, device_gib, job.micro_batch)
            if best is not None and best.micro_batch > reached:
                found.append(_describe(job, best))
                reached = best.micro_batch
                break
    return found


def _remedies(job: Job, global_batch_size: int) -> Iterator[Iterator[Job]]:
    yield iter([job])
    lean = replace(job, gradient_checkpointing=True)
    if not job.gradient_checkpointing:
        yield iter([lean])
    yield (
        replace(lean, world_size=world)
        for world in range(job.world_size + 1, min(MAX_GPUS, global_batch_size) + 1)
        if world % job.world_size == 0 and global_batch_size % world == 0
    )
    yield (replace(lean, sequence=length) for length in _shorter(job.sequence))


def _shorter(sequence: int) -> Iterator[int]:
    length = 1 << (sequence - 1).bit_length() - 1
    while length >= SHORTEST_SEQUENCE:
        yield length
        length //= 2


def _describe(job: Job, changed: Job) -> Suggestion:
    fields: dict[str, tuple[int | bool, int | bool]] = {
        "training.microBatchSize": (job.micro_batch, changed.micro_batch),
        "training.gradientCheckpointing": (job.gradient_checkpointing, changed.gradient_checkpointing),
        "parallelism.nodes * parallelism.gpusPerNode": (job.world_size, changed.world_size),
        "dataset.maxSeqLength": (job.sequence, changed.sequence),
    }
    return Suggestion({name: new for name, (old, new) in fields.items() if new != old}, plan_memory(changed))
