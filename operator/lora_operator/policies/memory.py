"""Smaller micro-batches after a run is out of memory (runPolicy.onOutOfMemory). All pure."""

from lora_api import Failure, FailureClass, LoRAFineTune

OUT_OF_MEMORY = frozenset({FailureClass.GPU_OUT_OF_MEMORY, FailureClass.HOST_OUT_OF_MEMORY})


def find_micro_batch(run: LoRAFineTune, failure: Failure) -> int | None:
    """The micro-batch that ``failure`` happened with, or ``None`` where it was auto and nobody said what it became."""
    status, asked = run.status, run.spec.training.micro_batch_size
    planned = status.plan.micro_batch_size if status.plan else None
    return failure.micro_batch_size or status.micro_batch_size or (planned if asked == "auto" else asked)


def shrink_micro_batch(run: LoRAFineTune, failure: Failure) -> int | None:
    """The micro-batch to try after ``failure``, or ``None``: another one would not help, or is not wanted.

    At most half of what it was, and a divisor of what each process has in one optimizer step, so that globalBatchSize
    stays what it is.
    """
    wanted = run.spec.run_policy.on_out_of_memory == "shrinkMicroBatch"
    if not wanted or failure.failure_class not in OUT_OF_MEMORY or failure.attempt == 0:
        return None
    half = (find_micro_batch(run, failure) or 1) // 2
    share = run.spec.training.global_batch_size // run.spec.parallelism.world_size
    return next((size for size in range(half, 0, -1) if share % size == 0), None)
