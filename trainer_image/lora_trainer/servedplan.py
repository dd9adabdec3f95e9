"""Whether, and how, the adapter can be evaluated on the base model as it is served. Pure arithmetic; no torch.

The unquantized base takes two to eight times the memory of the one that is trained on, and it comes after training, in
the same processes: the trained model is gone by then. It is always sharded over all of them, whatever the training's
strategy was, and where that is not enough it is kept in host memory and its layers gathered from there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_api.finetune import LoRAFineTuneSpec
from lora_api.publishing import ServedDtype, choose_served_dtype
from lora_api.run import RunSpec
from lora_api.training import Quantization
from lora_trainer.job import Job
from lora_trainer.memory import (
    GIB,
    MemoryPlan,
    adapter_weights,
    gathered_bytes,
    loading_bytes,
    loss_bytes,
    mask_bytes,
    saved_bytes,
    weight_bytes,
)
from lora_trainer.strategy import Strategy

SERVED_RECORDS = 256
"""Evaluation records that are measured on the base as it is served, at the most. With so many, one standard error of a
share is 3 %; the loss is an average over their tokens, and much finer."""


@dataclass(frozen=True)
class ServedPlan:
    """How the adapter is evaluated on the base in ``dtype``, or why not.

    Attributes:
        dtype: the type of the unquantized base weights.
        same_base: the base that is trained on is that one: there is nothing more to evaluate.
        token_budget: tokens in a batch, with padding; ``None``: as in the evaluations before and after training.
        offload: the base is in host memory, and its layers are gathered from there.
        memory: the plan of its memory; ``None``: it is not known.
        problem: why it is not evaluated; ``None``: it is.
    """

    dtype: ServedDtype
    same_base: bool = False
    token_budget: int | None = None
    offload: bool = False
    memory: MemoryPlan | None = None
    problem: str | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the base is loaded once more."""
        return not self.same_base and self.problem is None

    def strategy(self, world_size: int) -> Strategy:
        """How the base is spread over the processes."""
        if world_size == 1 and not self.offload:
            return Strategy("alone")
        return Strategy("fsdp", shards=world_size, offload=self.offload)

    def to_text(self) -> str:
        """What a person should know of it before training."""
        base = f"the base model as it is served ({self.dtype}, publish.servedDtype)"
        if self.same_base:
            return f"{base} is the one that is trained on: the evaluation after training is that of the served adapter"
        if self.problem is not None:
            return f"after training the adapter is not evaluated on {base}: {self.problem}"
        size = "" if self.memory is None else f": {self.memory.safe:.2f} GiB of each process to be safe"
        where = " from host memory" if self.offload else ""
        return f"after training the adapter is evaluated on {base}{where}{size}"


def plan_served(
    spec: RunSpec | LoRAFineTuneSpec, job: Job | None, device_gib: float | None, host_gib: float | None = None
) -> ServedPlan:
    """The plan for ``spec`` with ``device_gib`` GiB for each process; ``job`` is how it is trained.

    ``host_gib`` is host memory for each process, where its GPUs have some of their own. What is not known (``None``)
    is taken to be enough, but for the architecture: nothing is loaded after days of training that may not fit.
    """
    dtype = choose_served_dtype(spec.publish, spec.parallelism.gpus_per_node)
    if trains_on(spec.quantization, spec.parallelism.gpus_per_node) == dtype:
        return ServedPlan(dtype, same_base=True)
    if job is None:
        return ServedPlan(dtype, problem="how much memory this architecture needs is not known")
    plans: list[MemoryPlan] = []
    for candidate in _candidates(job, dtype):
        memory = plan_served_memory(candidate)
        plans.append(memory)
        on_host = weight_bytes(candidate) / candidate.shards / GIB if candidate.cpu_offload else 0.0
        if (device_gib is None or memory.fits(device_gib)) and (host_gib is None or on_host * 1.1 <= host_gib):
            return ServedPlan(dtype, token_budget=candidate.tokens, offload=candidate.cpu_offload, memory=memory)
    first, last = plans[0], plans[-1]
    available = device_gib or 0.0
    where = "process" if job.stack.host else "GPU"
    problem = f"it needs {first.safe:.2f} GiB of each {where} to be safe, and there are {available:.2f}"
    if not job.stack.host and last.fits(available):
        problem += ", and its host memory does not hold it either"
    elif not job.stack.host:
        problem += f"; with its weights in host memory it needs {last.safe:.2f}"
    return ServedPlan(dtype, memory=first, problem=problem)


def trains_on(quantization: Quantization, gpus_per_node: int) -> str | None:
    """The type of the base weights that are trained on; ``None`` where they are quantized."""
    if quantization.type != "none":
        return None
    if quantization.compute_dtype == "auto":
        return "bfloat16" if gpus_per_node else "float32"
    return quantization.compute_dtype


def _candidates(job: Job, dtype: ServedDtype) -> Iterator[Job]:
    """The base as it is served, sharded over all processes: the fastest way first, the least memory last."""
    plain = Quantization(type="none", compute_dtype=dtype)
    served = replace(job, quantization=plain, shard_size=None, cpu_offload=False, objective="sft")
    for offload in (False,) if job.stack.host else (False, True):
        yield replace(served, micro_batch=job.rows, cpu_offload=offload)
        yield replace(served, micro_batch=1, cpu_offload=offload)


def plan_served_memory(job: Job) -> MemoryPlan:
    """Peak memory of one process while ``job``, whose base is unquantized, is evaluated. Nothing is kept for gradients.

    The adapter has the type of the base. ``activations`` are at most what one layer would save for its backward pass:
    nothing lives longer than its layer.
    """
    weights = 0.0 if job.cpu_offload else weight_bytes(job) / job.shards
    adapter = 0.0 if job.cpu_offload else job.compute_bytes * adapter_weights(job) / job.shards
    layer = saved_bytes(job) + mask_bytes(job)
    gathered = gathered_bytes(job)
    evaluation = weights + adapter + gathered + max(layer, loss_bytes(job))
    return MemoryPlan(
        weights_sharded=weights / GIB,
        weights_replicated=0.0,
        gathered_layers=gathered / GIB,
        lora_and_optimizer=adapter / GIB,
        activations=layer / GIB,
        logits=max(0.0, loss_bytes(job) - layer) / GIB,
        dequantization=0.0,
        context=job.stack.context_gib + (job.stack.collectives_gib if job.world_size > 1 else 0.0),
        loading=max(0.0, loading_bytes(job) - evaluation) / GIB,
        safety=job.stack.safety_gib,
    )
