"""The LoRAFineTune resource: what a user asks for.

Every bound, default and description here becomes the CRD (``make generate``) and the API reference. A field exists
only once the trainer or the operator acts on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from lora_api import patterns
from lora_api._base import ApiModel, CelRule, find_section
from lora_api.pods import ObjectName, PodTemplate, ResourceRequirements
from lora_api.publishing import Credentials, Publish, Tracking
from lora_api.sources import BaseModelSource, Dataset
from lora_api.status import LoRAFineTuneStatus
from lora_api.training import MAX_GLOBAL_BATCH_SIZE, LoRA, Parallelism, Quantization, RunCheckpoint, Training

GROUP = "lorafinetune.io"
VERSION = "v1alpha1"
KIND: Literal["LoRAFineTune"] = "LoRAFineTune"
PLURAL = "lorafinetunes"
API_VERSION: Literal["lorafinetune.io/v1alpha1"] = "lorafinetune.io/v1alpha1"

MAX_NAME_LENGTH = 52
"""Longest name of a run: its pods are called ``<name>-<attempt>-<index>`` and a host name has at most 63 characters."""


QueueName = Annotated[str, StringConstraints(pattern=patterns.OBJECT_NAME, min_length=1, max_length=63)]
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
        description="Queue in which the run waits for its quota: a LocalQueue of Kueue in its namespace, or a queue of "
        "Volcano. Default: no queue.",
    )
    priority_class_name: ObjectName | None = Field(
        None,
        description="PriorityClass of the pods, and the priority in the queue unless workloadPriorityClassName is set.",
    )
    workload_priority_class_name: QueueName | None = Field(
        None,
        description="WorkloadPriorityClass of Kueue: the priority in the queue only, not that of the pods.",
    )

    max_restarts: int = Field(
        3,
        ge=0,
        le=100,
        description="Restarts of the gang that failures of the run itself may use up until a newer checkpoint is "
        "complete. Lost nodes, evictions and preemptions are not counted.",
    )
    on_out_of_memory: Literal["fail", "shrinkMicroBatch"] = Field(
        "fail",
        description="What follows when memory runs out. fail: the run ends. shrinkMicroBatch: it goes on with "
        "half the micro-batch and the same globalBatchSize, down to one sequence; not counted.",
    )
    suspend: bool = Field(
        default=False,
        description="true saves a checkpoint and frees the pods, false goes on from there, at any time.",
    )
    retry: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Raise it after a failure to have the run go on from its last checkpoint. Default: 0.",
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=315_360_000,
        description="Seconds that all pods of the gang may run, over all attempts; then the run ends with "
        "DeadlineExceeded. Default and most: limits.maxActiveDeadlineSeconds of the "
        "runtime, else no limit.",
    )
    stall_timeout_seconds: int = Field(
        3600,
        ge=10,
        le=604_800,
        description="Seconds without a word of progress from a gang that runs, after which it is restarted (Stalled). "
        "Loading and evaluation have to fit.",
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
        description="Seconds after the end of the run until its pods and their logs are deleted. Default: that of the "
        "runtime, else never.",
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
    return f"[{value}].map({name},{expression})[0]"


def _with_chunk(expression: str) -> str:
    """CEL for ``expression`` of ``t``, which is training, and of ``c``, the sequences that all processes take at once.

    An automatic micro-batch divides what it has to; until it is known, one sequence per process is the least. ``c`` is
    0 where a factor is out of its own bounds, which say so.
    """
    micro = "type(t.microBatchSize)==int?int(t.microBatchSize):1"
    out = "m<1||m>1024||p.nodes<1||p.nodes>64||p.gpusPerNode<0||p.gpusPerNode>16"
    chunk = f"{out}?0:m*p.nodes*(p.gpusPerNode>0?p.gpusPerNode:1)"
    return _let("t", "self.training", _let("p", "self.parallelism", _let("m", micro, _let("c", chunk, expression))))


def _decimal(number: str) -> str:
    """CEL for the digits of ``number``, a name of what is from 1 to 99999.

    ``string(number)`` cannot be joined to other text: the API server takes its length to be unbounded and refuses the
    cost of the rule. A piece of a constant has a bound.
    """
    digits = [
        f"'0123456789'.substring({number}/{power}%10,{number}/{power}%10+1)" for power in (10000, 1000, 100, 10, 1)
    ]
    leading = (f"({number}<{power}?'':{digit})" for power, digit in zip((10000, 1000, 100, 10), digits, strict=False))
    return "+".join((*leading, digits[-1]))


# Only evaluated where the chunk is from 1 to MAX_GLOBAL_BATCH_SIZE. b is the size below, a the one above.
_NEAREST_SIZES = _with_chunk(
    _let(
        "b",
        "t.globalBatchSize/c*c",
        _let(
            "a",
            "b+c",
            "'globalBatchSize must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1); the nearest: '+"
            f"(b==0?'':{_decimal('b')})+"
            f"(b==0||a>{MAX_GLOBAL_BATCH_SIZE}?'':' and ')+(a>{MAX_GLOBAL_BATCH_SIZE}?'':{_decimal('a')})",
        ),
    )
)


class LoRAFineTuneSpec(ApiModel):
    """One fine-tune. But for some fields of runPolicy it cannot be changed once created."""

    base_model: BaseModelSource = Field(description="The model that the adapter is trained on.")
    dataset: Dataset = Field(description="What to learn from, and what to measure with.")
    lora: LoRA = Field(default_factory=LoRA, description="Shape of the adapter.")
    quantization: Quantization = Field(
        default_factory=Quantization, description="How the frozen base weights are held."
    )
    training: Training = Field(description="The optimization.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How many nodes and GPUs train together.")
    checkpoint: RunCheckpoint = Field(default_factory=RunCheckpoint, description="What a restart goes on from.")
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
        description="Waiting, time limits, and what follows a failure.",
    )
    pod_template: PodTemplate = Field(default_factory=PodTemplate, description="What the pods of the gang get.")

    cel_rules = (
        CelRule(
            rule=_with_chunk(f"c<={MAX_GLOBAL_BATCH_SIZE}"),
            message=f"microBatchSize * nodes * max(gpusPerNode, 1) may be at most {MAX_GLOBAL_BATCH_SIZE}",
            field_path=".training.microBatchSize",
        ),
        CelRule(
            rule=_with_chunk(f"c<1||c>{MAX_GLOBAL_BATCH_SIZE}||t.globalBatchSize%c==0"),
            message="globalBatchSize must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1)",
            message_expression=_NEAREST_SIZES,
            field_path=".training.globalBatchSize",
        ),
        CelRule(
            rule="!has(self.training.evalEverySteps) || has(self.dataset.eval) || "
            "!has(self.dataset.evalFraction) || self.dataset.evalFraction != 0.0",
            message="evalEverySteps needs records to evaluate on: set dataset.eval, or an evalFraction above 0",
            field_path=".training.evalEverySteps",
        ),
        CelRule(
            rule="!has(self.publish.gate) || has(self.dataset.eval) || "
            "!has(self.dataset.evalFraction) || self.dataset.evalFraction != 0.0",
            message="gate needs records to evaluate on: set dataset.eval, or an evalFraction above 0",
            field_path=".publish.gate",
        ),
        CelRule(
            rule="self.training.objective == 'dpo' ? self.dataset.format in ['auto', 'preference'] : "
            "self.dataset.format != 'preference'",
            message="objective dpo learns from records with chosen and rejected answers (format preference)",
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
            rule="self.training.optimizer == 'adamw' || self.parallelism.gpusPerNode != 0",
            message="paged-adamw-8bit needs GPUs (parallelism.gpusPerNode above 0)",
            field_path=".training.optimizer",
        ),
    )


MUTABLE = (
    "suspend", "retry", "maxRestarts", "stallTimeoutSeconds", "activeDeadlineSeconds", "placementTimeoutSeconds",
    "ttlSecondsAfterFinished",
)  # fmt: skip
"""Fields of runPolicy that can be changed while the run lives."""

_UNCHANGEABLE = (
    "cannot be changed once created: delete this LoRAFineTune and create another one. Only "
    f"{', '.join(MUTABLE[:-1])} and {MUTABLE[-1]} of runPolicy can be"
)


def _fixed_fields(model: type[BaseModel]) -> Iterator[tuple[str, bool]]:
    """Each field of ``model``, as it is looked up in CEL, and whether it may be absent."""
    for name, field in model.model_fields.items():
        yield field.alias or name, field.default is None


def _fixed_policy() -> list[tuple[str, bool]]:
    return [(name, absent) for name, absent in _fixed_fields(RunPolicy) if name not in MUTABLE]


def _compare(name: str, optional: bool, how: str) -> str:
    """CEL for a comparison of the field ``name`` of ``n`` (new) with that of ``o`` (old). One may be absent.

    Each in a list of one: the API server takes the length of what is called by a name of our own to be unbounded, but
    counts the entries of a list.
    """
    dot = ".?" if optional else "."
    return f"[n{dot}{name}]{how}[o{dot}{name}]"


def _of_both(new: str, old: str, expression: str) -> str:
    return _let("n", new, _let("o", old, expression))


def _unchanged() -> str:
    """CEL for: everything in the spec but MUTABLE is as it was.

    It is not looked at where the status changes: the API server takes the spec from such a write as little as it takes
    the status from others, and the look costs it twice what all other rules cost.
    """
    fields = [(name, optional) for name, optional in _fixed_fields(LoRAFineTuneSpec) if name != "runPolicy"]
    policy = "&&".join(_compare(*field, "==") for field in _fixed_policy())
    same = "&&".join([*(_compare(*field, "==") for field in fields), _of_both("n.runPolicy", "o.runPolicy", policy)])
    changed = ["!has(oldSelf.status)"]
    changed += [f"[self.status.?{field}] != [oldSelf.status.?{field}]" for field in ("phase", "progress.?step")]
    return f"(has(self.status) && ({' || '.join(changed)})) || {_of_both('self.spec', 'oldSelf.spec', same)}"


def _first_changed(fields: Sequence[tuple[str, bool]], texts: Mapping[str, str]) -> str:
    """CEL for the name of the first of ``fields`` that changed, or what ``texts`` has for it."""
    *some, (last, _) = fields
    named = {name: texts.get(name, f"'{name}'") for name, _ in fields}
    return "".join(f"{_compare(*field, '!=')}?{named[field[0]]}:" for field in some) + named[last]


def _path_of_changed(model: type[BaseModel], fields: Sequence[tuple[str, bool]]) -> str:
    """CEL for the path, below ``n`` and ``o``, of the first of ``fields`` of ``model`` that changed.

    It goes down to the fields of each section. One that is there only before or only now has no fields to compare.
    """
    texts = {}
    for name, field in model.model_fields.items():
        path, section = field.alias or name, find_section(field.annotation)
        if section is None:
            continue
        inner = _fixed_policy() if section is RunPolicy else list(_fixed_fields(section))
        # CEL has no type for the fields of ResourceRequirements (pods.Quantity), but can compare them.
        new, old = (f"dyn({at}.{path})" if section is ResourceRequirements else f"{at}.{path}" for at in "no")
        text = f"'{path}.'+" + _of_both(new, old, _path_of_changed(section, inner))
        texts[path] = f"(has(n.{path})&&has(o.{path})?{text}:'{path}')" if field.default is None else text
    return _first_changed(fields, texts)


def _name_of_changed() -> str:
    """CEL for the path of the first field of the spec that changed, and what can be done."""
    fields = [field for field in _fixed_fields(LoRAFineTuneSpec) if field[0] != "runPolicy"] + [("runPolicy", False)]
    name = _of_both("self.spec", "oldSelf.spec", _path_of_changed(LoRAFineTuneSpec, fields))
    return f"'spec.'+{name}+' {_UNCHANGEABLE}'"


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
            message="spec cannot be changed once created",
            message_expression=_name_of_changed(),
            field_path=".spec",
        ),
    )
