"""Rules on the run document alone, before anything is fetched: what the API server refuses too, and what it cannot see.

Preflight and the training processes read them here. Imports no torch.
"""

from collections.abc import Callable

from lora_api.run import RunSpec
from lora_api.training import Parallelism
from lora_trainer.errors import BadSpecError
from lora_trainer.strategy import decide_strategy


def check_optimizer(run: RunSpec) -> None:
    """8-bit AdamW runs on GPUs, on whole weights.

    Raises:
        BadSpecError: on CPUs, or with a sharded adapter.
    """
    if run.training.optimizer == "adamw":
        return
    if run.parallelism.gpus_per_node == 0:
        raise BadSpecError(
            "training.optimizer: paged-adamw-8bit needs GPUs (parallelism.gpusPerNode above 0); use adamw"
        )
    if _uses_fsdp(run.parallelism):
        raise BadSpecError(
            "training.optimizer: paged-adamw-8bit works in blocks of whole weights, and FSDP shards the adapter: use "
            "adamw, whose moments are sharded too, or parallelism.strategy ddp without cpuOffload"
        )


def _uses_fsdp(parallelism: Parallelism) -> bool:
    return parallelism.cpu_offload or (parallelism.world_size > 1 and parallelism.strategy != "ddp")


def check_strategy(run: RunSpec) -> None:
    """The fields of ``parallelism`` go together.

    Raises:
        BadSpecError: they do not.
    """
    decide_strategy(run.parallelism)


RULES: tuple[Callable[[RunSpec], None], ...] = (check_strategy, check_optimizer)


def check_run(run: RunSpec) -> None:
    """Raises BadSpecError for the first rule that ``run`` breaks."""
    for rule in RULES:
        rule(run)
