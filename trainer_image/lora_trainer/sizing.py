"""Settles the micro-batch before weights are loaded, the same on all processes, and refuses what cannot fit."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from lora_api.adapter import CompleteMarker
from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError
from lora_trainer.exchange import broadcast_json
from lora_trainer.fitting import build_job, settle
from lora_trainer.hostmemory import available_bytes
from lora_trainer.job import Job
from lora_trainer.memory import GIB, MemoryPlan, plan_memory
from lora_trainer.memrecord import MemoryRecord
from lora_trainer.modelshape import UnplannedModelError, read_shape
from lora_trainer.settings import Place, local_processes
from lora_trainer.trainer import batch_plan


@dataclass(frozen=True)
class Decision:
    """What rank 0 decided, for all processes: the micro-batch, or why the run is refused."""

    micro_batch: int = 1
    plan: MemoryPlan | None = None
    warning: str = ""
    refusal: str = ""


def settle_micro_batch(
    run: RunSpec,
    model: Path,
    place: Place,
    device: torch.device,
    find_checkpoint: Callable[[], CompleteMarker | None],
    longest: int | None = None,
) -> tuple[RunSpec, MemoryRecord]:
    """``run`` with its micro-batch as a number, and the plan of its memory. All processes call it.

    ``longest`` is the number of tokens of the longest record, if it is known: no batch is longer. Rank 0 decides, with
    the memory of the process that has the least. A resumed run on as many processes as before keeps its micro-batch:
    the numbers of training do not depend on it, but the order in which they are added up does.

    Raises:
        BadSpecError: with microBatchSize auto, the plan says that not even one sequence fits; the message has the
            remedies. A size that the user chose is trained with a warning: the plan is an estimate.
    """
    batch_plan(run)
    available = least_available(place, device)
    found = Decision()
    if place.is_main:
        found = decide(run, model, available, find_checkpoint, longest)
    found = _broadcast(found)
    if found.refusal:
        raise BadSpecError(found.refusal)
    if found.warning and place.is_main:
        sys.stderr.write(f"{found.warning}\n")
    settled = run.with_micro_batch(found.micro_batch)
    steps = batch_plan(settled).gradient_accumulation_steps
    on_gpu = device.type == "cuda"
    return settled, MemoryRecord(found.micro_batch, steps, on_gpu, found.plan, available)


def decide(
    run: RunSpec,
    model: Path,
    available: float | None,
    find_checkpoint: Callable[[], CompleteMarker | None],
    longest: int | None,
) -> Decision:
    """The micro-batch of ``run`` with ``available`` GiB for each process."""
    asked = run.training.micro_batch_size
    before = find_checkpoint() if asked == "auto" else None
    if before is not None and before.world_size == run.parallelism.world_size and before.micro_batch_size:
        run = run.with_micro_batch(before.micro_batch_size)
    try:
        shape = read_shape(json.loads((model / "config.json").read_text(encoding="utf-8")))
        job = build_job(run, shape, longest=longest or None, device_gib=available)
    except UnplannedModelError as error:
        if asked != "auto":
            return Decision(asked)
        return Decision(warning=f"training.microBatchSize: auto is 1 for this model: {error}")
    except BadSpecError as error:
        return Decision(refusal=str(error))
    return _fit(run, job, available)


def _fit(run: RunSpec, job: Job, available: float | None) -> Decision:
    chosen, complaint = settle(run.training, job, available)
    if chosen is None:
        return Decision(refusal=complaint)
    return Decision(chosen.micro_batch, plan_memory(chosen), complaint)


def least_available(place: Place, device: torch.device) -> float | None:
    """Memory in GiB that each process may plan with: the least over all of them. ``None``: nothing says.

    On a GPU what is free, and the context that is there already, which the plan counts too. On CPUs the processes of a
    pod share what is left of its limit.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        mine = min(float(total), free + 0.5 * GIB)
    else:
        mine = float(available_bytes() or 0) / local_processes()
    if dist.is_initialized():
        tensor = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        mine = float(tensor)
    return mine / GIB if mine > 0 else None


def _broadcast(found: Decision) -> Decision:
    said = broadcast_json(asdict(found))
    plan = said["plan"]
    return replace(Decision(**said), plan=None if plan is None else MemoryPlan(**plan))
