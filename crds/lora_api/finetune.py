"""The LoRAFineTune resource: what a user asks for.

Every bound, default and description here becomes the CRD (``make generate``) and the API reference. A field exists
only once the trainer or the operator acts on it.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from lora_api._base import ApiModel, CelRule
from lora_api.pods import ObjectName, PodTemplate
from lora_api.publishing import Credentials, Publish, Tracking
from lora_api.sources import BaseModelSource, Dataset
from lora_api.status import LoRAFineTuneStatus
from lora_api.training import MAX_GLOBAL_BATCH_SIZE, Checkpoint, LoRA, Parallelism, Quantization, Training

GROUP = "lorafinetune.io"
VERSION = "v1alpha1"
KIND: Literal["LoRAFineTune"] = "LoRAFineTune"
PLURAL = "lorafinetunes"
API_VERSION: Literal["lorafinetune.io/v1alpha1"] = "lorafinetune.io/v1alpha1"

MAX_NAME_LENGTH = 52
"""Longest name of a run: its pods are called ``<name>-<attempt>-<index>`` and a host name has at most 63 characters."""


QueueName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=63)]
"""Name of a queue: it becomes the value of a label."""

MAX_TTL_SECONDS = 315_360_000
"""Ten years."""


class RuntimeRef(ApiModel):
    """A ClusterLoRARuntime."""

    name: ObjectName = Field(description="Name of the ClusterLoRARuntime.")


class RunPolicy(ApiModel):
    """When a run waits, how long it may take, what happens when something fails, and what is left of it."""

    queue_name: QueueName | None = Field(
        None,
        description="Queue in which the run waits for quota: a LocalQueue of Kueue in its namespace, or a queue of "
        "Volcano where the operator works with that. Default: none.",
    )
    priority_class_name: ObjectName | None = Field(
        None,
        description="PriorityClass of the pods. In the queue the run has the same priority, unless "
        "workloadPriorityClassName says another.",
    )
    workload_priority_class_name: QueueName | None = Field(
        None,
        description="WorkloadPriorityClass of Kueue: the priority in the queue only, not that of the pods.",
    )

    max_restarts: int = Field(
        3,
        ge=0,
        le=100,
        description="Restarts of the whole gang that failures of the run itself may use up until a newer checkpoint "
        "is complete. Lost nodes, evictions and preemptions are not counted.",
    )
    on_out_of_memory: Literal["fail", "shrinkMicroBatch"] = Field(
        "fail",
        description="What follows when a GPU or a pod runs out of memory. fail: the run ends. shrinkMicroBatch: it "
        "goes on from its last checkpoint with half the micro-batch and the same globalBatchSize, down to one "
        "sequence; this is not counted.",
    )
    suspend: bool = Field(
        default=False,
        description="Set to true to save a checkpoint and free the pods, and to false to go on. It can be changed.",
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=315_360_000,
        description="Seconds that the whole gang may run, over all attempts; then the run ends with "
        "DeadlineExceeded. It can be changed. Default and most: limits.maxActiveDeadlineSeconds of the "
        "runtime, else no limit.",
    )
    stall_timeout_seconds: int = Field(
        3600,
        ge=10,
        le=604_800,
        description="Seconds without a word of progress after which a gang that runs is restarted (Stalled). Leave "
        "room for loading the model and for the evaluation.",
    )
    placement_timeout_seconds: int | None = Field(
        None,
        ge=1,
        le=604_800,
        description="Seconds that pods keep their nodes while others of the gang find none; then all are ended, and "
        "tried again later. Default: 600.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=MAX_TTL_SECONDS,
        description="Seconds after the end of the run until its pods, and with them their logs, are deleted. It can be "
        "changed. Default: that of the runtime, else never.",
    )
    ttl_deletes: Literal["children", "run"] = Field(
        "children",
        description="What ttlSecondsAfterFinished deletes. children: all that was made for the run. run: this "
        "LoRAFineTune too. The adapter in the store stays.",
    )

    cel_rules = (
        CelRule(
            rule="!has(self.workloadPriorityClassName) || has(self.queueName)",
            message="workloadPriorityClassName is the priority in a queue: set queueName too",
            field_path=".workloadPriorityClassName",
        ),
    )


def _let(name: str, value: str, expression: str) -> str:
    """CEL for ``expression``, in which ``value`` is called ``name``: map() over one value is how CEL names one.

    It is looked up once then. Each look-up in ``self`` makes the API server copy the schema of all its fields.
    """
    return f"[{value}].map({name}, {expression})[0]"


def _with_chunk(expression: str) -> str:
    """CEL for ``expression`` of ``training`` and of ``chunk``, the sequences that all processes take at once.

    An automatic micro-batch divides what it has to; until it is known, one sequence per process is the least.
    """
    micro = "(type(training.microBatchSize) == int ? int(training.microBatchSize) : 1)"
    chunk = f"{micro} * parallel.nodes * (parallel.gpusPerNode > 0 ? parallel.gpusPerNode : 1)"
    with_parallel = _let("parallel", "self.parallelism", _let("chunk", chunk, expression))
    return _let("training", "self.training", with_parallel)


def _decimal(number: str) -> str:
    """CEL for the digits of ``number``, an expression from 1 to 99999.

    ``string(number)`` cannot be joined to other text: the API server takes its length to be unbounded and refuses the
    cost of the rule. A piece of a constant has a bound.
    """
    digits = [
        f"'0123456789'.substring({number} / {power} % 10, {number} / {power} % 10 + 1)"
        for power in (10000, 1000, 100, 10, 1)
    ]
    leading = (
        f"({number} < {power} ? '' : {digit})" for power, digit in zip((10000, 1000, 100, 10), digits, strict=False)
    )
    return " + ".join((*leading, digits[-1]))


# Only evaluated where the chunk is at most MAX_GLOBAL_BATCH_SIZE.
_NEAREST_SIZES = _with_chunk(
    _let(
        "below",
        "training.globalBatchSize / chunk * chunk",
        "'globalBatchSize must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1) = ' + "
        f"{_decimal('chunk')} + '; the nearest: ' + "
        f"(below == 0 ? '' : {_decimal('below')}) + "
        f"(below == 0 || below + chunk > {MAX_GLOBAL_BATCH_SIZE} ? '' : ' and ') + "
        f"(below + chunk > {MAX_GLOBAL_BATCH_SIZE} ? '' : {_decimal('(below + chunk)')})",
    )
)


MUTABLE = ("suspend", "activeDeadlineSeconds", "placementTimeoutSeconds", "ttlSecondsAfterFinished")
"""Fields of runPolicy that can be changed while the run lives."""

SECTIONS = (
    "baseModel", "dataset", "lora", "quantization", "training", "parallelism", "checkpoint", "publish", "tracking",
    "podTemplate",
)  # fmt: skip


def _unchanged() -> str:
    """CEL for: everything in the spec but MUTABLE is as it was.

    It is not looked at where the status changes: the API server takes the spec from such a write as little as it takes
    the status from others, and the look costs it twice what all other rules cost.
    """
    fixed = [f"runPolicy.{name}" for name in ("maxRestarts", "onOutOfMemory", "stallTimeoutSeconds", "ttlDeletes")]
    same = [f"self.spec.{field} == oldSelf.spec.{field}" for field in (*SECTIONS, *fixed)]
    optional = ("queueName", "priorityClassName", "workloadPriorityClassName")
    for field in ("credentials", "runtimeRef", *(f"runPolicy.{name}" for name in optional)):
        same.append(f"has(self.spec.{field}) == has(oldSelf.spec.{field})")
        same.append(f"(!has(self.spec.{field}) || self.spec.{field} == oldSelf.spec.{field})")
    changed = ["!has(oldSelf.status)"]
    for section, field in (("phase", "phase"), ("progress", "progress.step")):
        there = f"has(self.status.{section}) && has(oldSelf.status.{section})"
        changed.append(f"({there} && self.status.{field} != oldSelf.status.{field})")
    return f"(has(self.status) && ({' || '.join(changed)})) || ({' && '.join(same)})"


class LoRAFineTuneSpec(ApiModel):
    """One fine-tune. But for four fields of runPolicy it cannot be changed once created."""

    base_model: BaseModelSource = Field(description="The model that the adapter is trained on.")
    dataset: Dataset = Field(description="What to learn from, and what to measure with.")
    lora: LoRA = Field(default_factory=LoRA, description="Shape of the adapter.")
    quantization: Quantization = Field(
        default_factory=Quantization, description="How the frozen base weights are held."
    )
    training: Training = Field(description="The optimization.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How many nodes and GPUs train together.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="What a restart goes on from.")
    publish: Publish = Field(default_factory=Publish, description="Where the adapter goes.")
    tracking: Tracking = Field(default_factory=Tracking, description="Who else is told of the run.")
    credentials: Credentials | None = Field(None, description="How the pods reach the store and the model hub.")
    runtime_ref: RuntimeRef | None = Field(
        None,
        description="What an administrator has settled: image, GPUs, store, defaults, limits. Default: the "
        "ClusterLoRARuntime called default, if there is one.",
    )
    run_policy: RunPolicy = Field(
        default_factory=RunPolicy,
        description="When the run waits, how long it may take, and what happens when something fails.",
    )
    pod_template: PodTemplate = Field(default_factory=PodTemplate, description="What the pods of the gang get.")

    cel_rules = (
        CelRule(
            rule=_with_chunk(f"chunk <= {MAX_GLOBAL_BATCH_SIZE}"),
            message=f"microBatchSize * nodes * max(gpusPerNode, 1) may be at most {MAX_GLOBAL_BATCH_SIZE}",
            field_path=".training.microBatchSize",
        ),
        CelRule(
            rule=_with_chunk(f"chunk > {MAX_GLOBAL_BATCH_SIZE} || training.globalBatchSize % chunk == 0"),
            message="globalBatchSize must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1)",
            message_expression=_NEAREST_SIZES,
            field_path=".training.globalBatchSize",
        ),
        CelRule(
            rule="!has(self.training.evalEverySteps) || has(self.dataset.eval) || "
            "!has(self.dataset.evalFraction) || self.dataset.evalFraction > 0.0",
            message="evalEverySteps needs records to evaluate on: set dataset.eval, or an evalFraction above 0",
            field_path=".training.evalEverySteps",
        ),
        CelRule(
            rule="!has(self.publish.gate) || has(self.dataset.eval) || "
            "!has(self.dataset.evalFraction) || self.dataset.evalFraction > 0.0",
            message="gate needs records to evaluate on: set dataset.eval, or an evalFraction above 0",
            field_path=".publish.gate",
        ),
        CelRule(
            rule="self.training.objective == 'dpo' ? self.dataset.format in ['auto', 'preference'] : "
            "self.dataset.format != 'preference'",
            message="objective dpo learns from records with chosen and rejected answers (format preference), and no "
            "other objective does",
            field_path=".dataset.format",
        ),
        CelRule(
            rule="self.training.objective != 'dpo' || !self.dataset.packing",
            message="packing joins records of objective sft; with dpo set it to false",
            field_path=".dataset.packing",
        ),
        CelRule(
            rule="self.training.objective != 'dpo' || !self.dataset.assistantOnlyLoss",
            message="assistantOnlyLoss belongs to objective sft; dpo compares the chosen and the rejected answer",
            field_path=".dataset.assistantOnlyLoss",
        ),
        CelRule(
            rule="self.training.optimizer == 'adamw' || self.parallelism.gpusPerNode > 0",
            message="paged-adamw-8bit needs GPUs (parallelism.gpusPerNode above 0)",
            field_path=".training.optimizer",
        ),
    )


class ObjectMeta(ApiModel):
    """The part of Kubernetes' ObjectMeta that the operator reads."""

    model_config = {"extra": "ignore"}

    name: str
    namespace: str
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class LoRAFineTune(ApiModel):
    """Fine-tunes a language model with QLoRA over one or more nodes and publishes the adapter."""

    api_version: Literal["lorafinetune.io/v1alpha1"] = API_VERSION
    kind: Literal["LoRAFineTune"] = KIND
    metadata: ObjectMeta
    spec: LoRAFineTuneSpec = Field(description="What is asked for.")
    status: LoRAFineTuneStatus = Field(default_factory=LoRAFineTuneStatus, description="What the operator has seen.")

    cel_rules = (
        CelRule(
            rule=f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
            message=f"metadata.name may have at most {MAX_NAME_LENGTH} characters, so that the names of its pods fit "
            "in 63",
        ),
        CelRule(
            rule="self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            message="metadata.name must start with a letter and have only a-z, 0-9 and '-': it becomes the name of a "
            "Service",
        ),
        CelRule(
            rule=_unchanged(),
            message="spec cannot be changed once created: delete this LoRAFineTune and create another one. Only "
            "runPolicy.suspend, activeDeadlineSeconds, placementTimeoutSeconds and ttlSecondsAfterFinished can be",
            field_path=".spec",
        ),
    )
