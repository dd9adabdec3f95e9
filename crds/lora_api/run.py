"""RunSpec: the one document that the operator hands to the trainer's pods, as an annotation that is a file in them."""

from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field

from lora_api._base import ApiModel
from lora_api.finetune import LoRAFineTune
from lora_api.preflight import Pins, SourcePin
from lora_api.publishing import PublishTo, Tracking
from lora_api.runtime import taken_runtime
from lora_api.sources import BaseModelSource, Dataset, DataSource
from lora_api.training import MAX_GLOBAL_BATCH_SIZE, LoRA, Parallelism, Quantization, RunCheckpoint, Training

RUN_FILE = "/etc/lora/run.json"
"""Where the pods find the document."""

WORK_DIRECTORY = "/scratch"
"""Writable scratch directory of the pods."""

PVC_ROOT = "/mnt/pvc"
"""Claims of pvc:// URIs are mounted read-only at PVC_ROOT/CLAIM."""

TERMINATION_LOG = "/dev/termination-log"

CONTAINER_NAME = "trainer"

MASTER_PORT = 29500

RUN_VERSION = 2
"""Of the documents that this version makes: 2 has controlKey (``runversions``)."""


class Device(ApiModel):
    """The kind of GPU that a run is meant for: what its memory is planned with before there is one."""

    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    memory_gib: Annotated[float, Field(gt=0.0, le=4096.0, alias="memoryGiB")]


class RunSpec(ApiModel):
    """Everything that one attempt of a run needs to know, defaults filled in."""

    version: int = Field(RUN_VERSION, ge=1)
    namespace: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    uid: Annotated[str, Field(min_length=1)]
    attempt: int = Field(1, ge=1)
    base_model: BaseModelSource
    dataset: Dataset
    lora: LoRA = Field(default_factory=LoRA)
    quantization: Quantization = Field(default_factory=Quantization)
    training: Training
    parallelism: Parallelism = Field(default_factory=Parallelism)
    checkpoint: RunCheckpoint = Field(default_factory=RunCheckpoint)
    publish: PublishTo
    tracking: Tracking = Field(default_factory=Tracking)
    device: Device | None = None
    pins: Pins | None = None
    control_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @property
    def adapter_name(self) -> str:
        """Name under which the adapter's versions count up."""
        return self.publish.name or self.name

    @property
    def batch(self) -> "BatchPlan":
        """How one optimizer step's sequences are spread, as ``plan_batch`` has it."""
        return plan_batch(self.training, self.parallelism)

    def with_micro_batch(self, size: int) -> "RunSpec":
        """This run with a micro-batch that is settled."""
        return self.model_copy(update={"training": self.training.model_copy(update={"micro_batch_size": size})})


Source = TypeVar("Source", BaseModelSource, DataSource)


def build_run_spec(run: LoRAFineTune, attempt: int, control_key: str | None = None) -> RunSpec:
    """The document for ``attempt`` of ``run``: what it asks for, as far as the preflight settled it more exactly.

    ``control_key`` is what the ranks of the attempt sign their control messages with, 32 random bytes in hex.

    Raises:
        pydantic.ValidationError: publish.store is not set.
    """
    spec, pins, plan = run.spec, run.status.pins or Pins(), run.status.plan
    dataset = spec.dataset.model_copy(
        update={
            "train": _pin(spec.dataset.train, pins.train),
            "eval": _pin(spec.dataset.eval, pins.eval) if spec.dataset.eval else None,
        }
    )
    document = RunSpec(
        namespace=run.metadata.namespace,
        name=run.metadata.name,
        uid=run.metadata.uid,
        attempt=attempt,
        base_model=_pin(spec.base_model, pins.base_model),
        dataset=dataset,
        lora=spec.lora,
        quantization=spec.quantization,
        training=spec.training,
        parallelism=spec.parallelism,
        checkpoint=spec.checkpoint,
        publish=PublishTo.model_validate(dict(spec.publish)),
        tracking=spec.tracking,
        device=_planned_device(run),
        pins=run.status.pins,
        control_key=control_key,
    )
    settled = run.status.micro_batch_size or (plan.micro_batch_size if plan else None)
    return document if settled is None else document.with_micro_batch(settled)


def _pin(source: Source, pin: SourcePin | None) -> Source:
    """``source`` at the commit that was found, where it has commits."""
    if pin is None or pin.revision is None or not source.uri.startswith("hf://"):
        return source
    return source.model_copy(update={"revision": pin.revision})


def _planned_device(run: LoRAFineTune) -> Device | None:
    """The GPU of the run's runtime, unless the run trains on CPUs or asks for other nodes in its own nodeSelector."""
    gpu, labels = taken_runtime(run).gpu, run.spec.pod_template.node_selector
    if gpu is None or not run.spec.parallelism.gpus_per_node or not gpu.node_selector.items() <= labels.items():
        return None
    return Device(name=gpu.name, memory_gib=gpu.memory_gib)


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's sequences are spread.

    ``micro_batch_size * gradient_accumulation_steps * world_size == global_batch_size``.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step over all processes."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size


def plan_batch(training: Training, parallelism: Parallelism) -> BatchPlan:
    """Derives the gradient accumulation. A micro-batch that is still ``auto`` counts as 1, which divides every share.

    Raises:
        ValueError: the global batch size does not divide; the message names the nearest sizes that do.
    """
    micro_batch_size = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    chunk = micro_batch_size * parallelism.world_size
    if chunk > MAX_GLOBAL_BATCH_SIZE:
        raise ValueError(
            f"training.microBatchSize: microBatchSize * nodes * max(gpusPerNode, 1) is {chunk}, but may be at most "
            f"{MAX_GLOBAL_BATCH_SIZE}"
        )
    accumulation, rest = divmod(training.global_batch_size, chunk)
    if rest:
        nearest = [
            size for size in (accumulation * chunk, (accumulation + 1) * chunk) if 0 < size <= MAX_GLOBAL_BATCH_SIZE
        ]
        raise ValueError(
            f"training.globalBatchSize is {training.global_batch_size}, but must be a multiple of microBatchSize * "
            f"nodes * max(gpusPerNode, 1) = {chunk}; the nearest: {' and '.join(map(str, nearest))}"
        )
    return BatchPlan(micro_batch_size, accumulation, parallelism.world_size)
