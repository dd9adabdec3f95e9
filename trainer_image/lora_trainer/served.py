"""Evaluates the adapter on its base model as it is served: unquantized, in publish.servedDtype.

An adapter that learns on a quantized base learns to mend the quantization too, and what is published is served on
another base. So its losses there are what a reader should know, and what the gate looks at.

All of it comes after training, when the trained model is gone and its memory free. The base without the adapter is
measured then too, and not before training: the base is loaded once, nothing of it has to outlive a restart, and both
figures come from the same process. An adapter whose B matrices are zero is the base model, so it is measured before the
trained values are put in.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_api.run import RunSpec
from lora_api.served import Score, ServedEvaluation
from lora_trainer.adapter import ADAPTER
from lora_trainer.architecture import attention_implementation
from lora_trainer.devices import DTYPES
from lora_trainer.evaluate import Evaluation, Evaluator
from lora_trainer.fitting import build_job
from lora_trainer.hostmemory import available_bytes
from lora_trainer.loading import Part, keeping, part_to_load
from lora_trainer.loss import add_token_scores
from lora_trainer.memory import GIB
from lora_trainer.model import add_adapter, load_skeleton
from lora_trainer.modelshape import UnplannedModelError, read_shape
from lora_trainer.newtokens import NewTokens
from lora_trainer.parallel import assign_full, start_process_group
from lora_trainer.progress import Progress
from lora_trainer.rows import add_rows, find_rows, read_rows
from lora_trainer.servedplan import SERVED_RECORDS, ServedPlan, plan_served
from lora_trainer.settings import Place, local_processes
from lora_trainer.sharding import spread_model
from lora_trainer.verify import adapter_parameters

HEARTBEAT_SECONDS = 30.0
"""How often a long evaluation says that it is alive."""


@dataclass(frozen=True)
class OnServed:
    """The base as it is served with the adapter, its evaluator, and the evaluations without and with the adapter."""

    model: PeftModel
    evaluator: Evaluator
    before: Evaluation
    after: Evaluation


def plan_served_run(
    run: RunSpec, model: Path, longest: int | None, available: float | None, device: torch.device
) -> ServedPlan:
    """The plan for ``run`` with ``available`` GiB for each process; config.json is in the directory ``model``.

    ``longest`` is the number of tokens of the longest record, those that are evaluated included. All ranks call it with
    the same memory and so decide alike.
    """
    host = least_host_gib(device)
    try:
        shape = read_shape(json.loads((model / "config.json").read_text(encoding="utf-8")))
        job = build_job(run, shape, longest=longest, device_gib=available)
    except UnplannedModelError:
        job = None
    return plan_served(run, job, available, host)


def least_host_gib(device: torch.device) -> float | None:
    """Host memory in GiB for each process beside its GPU's: the least over all of them. ``None`` on CPUs."""
    if device.type != "cuda":
        return None
    mine = float(available_bytes() or 0) / local_processes() / GIB
    if dist.is_initialized():
        tensor = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        mine = float(tensor)
    return mine


def choose_part(records: int, most: int = SERVED_RECORDS) -> list[int] | None:
    """Numbers of the records that are measured, evenly spread; ``None``: all of them."""
    return None if records <= most else [number * records // most for number in range(most)]


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more. Modules and their hooks refer to each other, so they need this.

    torch keeps freed memory of a GPU, and page-locked memory of the host, in which offloaded weights were.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()


def evaluate_served(
    evaluator: Evaluator,
    run: RunSpec,
    base: Path,
    tokens: NewTokens,
    tensors: Mapping[str, torch.Tensor],
    plan: ServedPlan,
    progress: Progress,
) -> OnServed:
    """Loads the base in ``base`` and evaluates it without and with the adapter ``tensors``. All ranks call it.

    ``evaluator`` says what is measured; the model that it had is gone.

    Raises:
        DivergedError: a loss is not finite, on all ranks alike.
    """
    place, device = evaluator.place, evaluator.device
    if plan.offload and not dist.is_initialized():
        start_process_group(place, device, run.parallelism.collective_timeout_seconds, alone_too=True)
    progress.stage("evaluating")
    model = load_served(run, base, tokens, plan, place, device)
    progress.stage("evaluating")  # loading and what follows may each take long, and together pass for a stall
    served = evaluator.of_part(model, plan.token_budget or evaluator.token_budget)
    alive = _heartbeat(progress)
    before = served.measure(alive)
    assign_adapter(model, tensors)
    after = served.measure(alive)
    assert before is not None and after is not None  # noqa: S101, PT018 - nobody interrupts
    return OnServed(model, served, before, after)


def load_served(
    run: RunSpec, directory: Path, tokens: NewTokens, plan: ServedPlan, place: Place, device: torch.device
) -> PeftModel:
    """The base model as it is served with a fresh adapter, spread over the processes. All ranks call it.

    The adapter's matrices have the type of the base, as inference servers hold them (vLLM: --lora-dtype auto).
    """
    strategy = plan.strategy(place.world_size)
    part = part_to_load(strategy, place.rank)
    dtype = DTYPES[plan.dtype]
    model = add_adapter(load_unquantized(directory, dtype, device, part), run.lora, run.training.seed)
    for _, parameter, _ in adapter_parameters(model):
        parameter.data = parameter.data.to(dtype)
    add_rows(model, tokens, part)
    model.requires_grad_(requires_grad=False)
    spread_model(model, strategy, device)
    model.eval()
    return model


def load_unquantized(
    directory: Path, dtype: torch.dtype, device: torch.device, part: Part | None = None
) -> PreTrainedModel:
    """The base model in ``dtype`` on ``device``; with ``part``, that part of each weight alone."""
    with keeping(part):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention_implementation(load_skeleton(directory), device, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    add_token_scores(model)
    return model


def assign_adapter(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts the trained ``tensors``, whole and by PEFT's names, into ``model``. Each rank keeps its part."""
    for name, parameter, _ in adapter_parameters(model):
        assign_full(parameter, tensors[name.replace(f".{ADAPTER}.", ".")])
    learned = find_rows(model)
    if learned is not None:
        for module, value in zip((learned.embedding, learned.head), read_rows(learned, tensors, 1.0), strict=True):
            assign_full(module.rows, value)


def describe_served(
    plan: ServedPlan, records: int, before: Evaluation, after: Evaluation, found: OnServed | None
) -> ServedEvaluation | None:
    """What the manifest, the status and the report say; ``None`` without evaluation records.

    ``before`` and ``after`` are the evaluations of all ``records`` on the base that was trained on.
    """
    if not records:
        return None
    if plan.problem is not None:
        return ServedEvaluation(dtype=plan.dtype, all_records=records, problem=plan.problem)
    if found is None:
        first, last = _score(before), _score(after)
        return ServedEvaluation(
            dtype=plan.dtype,
            records=records,
            all_records=records,
            before=first,
            after=last,
            training=last,
            same_base=True,
        )
    return ServedEvaluation(
        dtype=plan.dtype,
        records=found.evaluator.records,
        all_records=records,
        before=_score(found.before),
        after=_score(found.after),
        training=after.part,
    )


def _score(found: Evaluation) -> Score:
    return Score(loss=found.loss, share=found.share)


def _heartbeat(progress: Progress) -> Callable[[], bool]:
    """Called after each batch: says now and then that the run is alive, and never that it is to be left."""
    spoke = time.monotonic()

    def beat() -> bool:
        nonlocal spoke
        if time.monotonic() - spoke > HEARTBEAT_SECONDS:
            progress.stage("evaluating")
            spoke = time.monotonic()
        return False

    return beat
