"""The ClusterLoRARuntime resource: what an administrator settles once, for many runs.

A run takes what it does not say itself from its runtime, and may not go beyond the runtime's limits. It takes a
snapshot when it starts (``status.runtime``), so that later edits change no run that has begun.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints
from pydantic.config import JsonDict

from lora_api import patterns
from lora_api._base import ApiModel, CelRule
from lora_api.endpoints import Endpoints
from lora_api.finetune import API_VERSION, MAX_TTL_SECONDS, LoRAFineTune, QueueName
from lora_api.network import EgressRules, Identity
from lora_api.pods import LabelMap, LabelValue, ObjectName, PreflightResources, RuntimePodTemplate, qualified_names
from lora_api.publishing import StoreUri, store_rules
from lora_api.reading import Reading, read
from lora_api.training import Checkpoint

KIND: Literal["ClusterLoRARuntime"] = "ClusterLoRARuntime"
PLURAL = "clusterloraruntimes"

DEFAULT_RUNTIME = "default"
"""Name of the runtime of runs that name none."""

ImageName = Annotated[str, StringConstraints(pattern=patterns.PRINTABLE, min_length=1, max_length=512)]
UriPrefix = Annotated[str, StringConstraints(pattern=patterns.URI_PREFIX, max_length=512)]
UriPrefixes = Annotated[list[UriPrefix], Field(min_length=1, max_length=64)]
StorePrefix = Annotated[str, StringConstraints(pattern=patterns.STORE_PREFIX, max_length=512)]
StorePrefixes = Annotated[list[StorePrefix], Field(min_length=1, max_length=64)]
MetadataName = Annotated[str, StringConstraints(pattern=patterns.METADATA_NAME, max_length=316)]
MetadataNames = Annotated[list[MetadataName], Field(max_length=64)]
_SET: JsonDict = {"x-kubernetes-list-type": "set"}


class Gpu(ApiModel):
    """The kind of GPU that the nodes of this runtime have."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] = Field(
        description="Name of the GPU, for people, such as NVIDIA H100 80GB."
    )
    memory_gib: float = Field(
        alias="memoryGiB",
        gt=0.0,
        le=4096.0,
        description="Memory of one GPU in GiB, as nvidia-smi shows it. The memory of a run is planned with it before "
        "there is a GPU.",
    )
    node_selector: LabelMap = Field(
        {},
        description="Labels of the nodes that have it. They are added to nodeSelector of runs with GPUs, and of no "
        "others.",
    )

    cel_rules = (qualified_names("nodeSelector"),)


class LabelRequirement(ApiModel):
    """A condition on one label (the same as in Kubernetes' own selectors)."""

    key: Annotated[str, StringConstraints(pattern=patterns.QUALIFIED_NAME, max_length=316)] = Field(
        description="The label."
    )
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(
        description="What must hold of it. NotIn holds of a label that is not there, too."
    )
    values: Annotated[list[LabelValue], Field(min_length=1, max_length=64)] | None = Field(
        None, description="The values that In and NotIn are about.", json_schema_extra=_SET
    )

    cel_rules = (
        CelRule(
            rule="has(self.values) == (self.operator in ['In', 'NotIn'])",
            message="operators In and NotIn need values, and the others take none",
            field_path=".values",
        ),
    )


class LabelSelector(ApiModel):
    """Which objects, by their labels (the same as Kubernetes' own). All of it must hold; empty: all objects."""

    match_labels: LabelMap | None = Field(None, description="Labels that must be there with these values.")
    match_expressions: Annotated[list[LabelRequirement], Field(max_length=16)] | None = Field(
        None, description="Further conditions.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )


class Limits(ApiModel):
    """What a run may ask for at most. One that asks for more fails with RuntimeRefused."""

    max_nodes: int | None = Field(None, ge=1, le=64, description="Most nodes of a run. Default: no limit.")
    max_gpus: int | None = Field(
        None,
        alias="maxGPUs",
        ge=0,
        le=512,
        description="Most GPUs of a run, over all its nodes. What podTemplate.resources asks for of "
        "nvidia.com/mig-PROFILE, VENDOR/gpu and their like counts too, each part as one. 0 allows training on CPUs "
        "only. Default: no limit.",
    )
    model_uri_prefixes: UriPrefixes | None = Field(
        None,
        description="Where base models may come from. hf://meta-llama allows hf://meta-llama/NAME, and s3://bucket/a "
        "allows s3://bucket/a/b but not s3://bucket/ab. Default: anywhere.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    data_uri_prefixes: UriPrefixes | None = Field(
        None,
        description="Where records may come from, in the same way. Default: anywhere.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    store_prefixes: StorePrefixes | None = Field(
        None,
        description="Where runs may publish, apart from store, in the same way. Below one of these and below store a "
        "run may publish to PREFIX itself and below PREFIX/NAMESPACE only, where NAMESPACE is its own, and go on from "
        "checkpoints there (checkpoint.resumeFrom.uri). Default: anywhere.",
        json_schema_extra=_SET,
    )
    max_active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=315_360_000,
        description="Longest runPolicy.activeDeadlineSeconds of a run, and that of a run without one. A deadline that "
        "is raised later has no effect beyond it. Default: no limit.",
    )
    annotation_names: MetadataNames | None = Field(
        None,
        description="Annotations that runs may set in podTemplate, besides those of Kueue for topology: NAME, "
        "DOMAIN/NAME, DOMAIN/* or *. Default: none.",
        json_schema_extra=_SET,
    )
    label_names: MetadataNames | None = Field(
        None,
        description="Labels that runs may set in podTemplate, in the same way. Default: none.",
        json_schema_extra=_SET,
    )
    priority_class_names: Annotated[list[ObjectName], Field(max_length=64)] | None = Field(
        None,
        description="What runs may name in runPolicy.priorityClassName and workloadPriorityClassName. Default: "
        "anything but system-*.",
        json_schema_extra=_SET,
    )
    queue_required: bool | None = Field(
        None, description="Whether a run needs a queue: its own or that of the runtime. Default: it does not."
    )


class ClusterLoRARuntimeSpec(ApiModel):
    """What runs get that do not say it themselves, and what they may ask for at most."""

    image: ImageName | None = Field(
        None, description="Image of the training pods. Default: the operator's --trainer-image."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="When nodes pull it. Default: the operator's --trainer-image-pull-policy."
    )
    gpu: Gpu | None = Field(None, description="The kind of GPU. Default: not known before the pods run.")
    pod_template: RuntimePodTemplate = Field(
        default_factory=RuntimePodTemplate,
        description="What the pods of the gang get. A run's own podTemplate wins: resource by resource, label by "
        "label, variable by variable; tolerations and imagePullSecrets are added up.",
    )
    endpoints: Endpoints | None = Field(
        None, description="The servers that runs talk to. Default: AWS, huggingface.co, and no tracker but W&B's own."
    )
    store: StoreUri | None = Field(
        None, description="Where runs without publish.store publish: s3://BUCKET/PREFIX. Default: each run has to say."
    )
    checkpoint: Checkpoint = Field(
        default_factory=Checkpoint,
        description="For runs that say neither everySteps nor everyMinutes, or no keep, or no retainHours.",
    )
    termination_grace_period_seconds: int | None = Field(
        None,
        ge=1,
        le=86_400,
        description="Seconds that a pod has between SIGTERM and SIGKILL, to save a checkpoint. Default: the operator's "
        "--termination-grace.",
    )
    preflight: bool | None = Field(
        None,
        description="Whether runs are checked, by a pod without a GPU, before their first attempt. Default: the "
        "operator's --preflight.",
    )
    preflight_resources: PreflightResources | None = Field(
        None,
        description="What a preflight asks for and may take. Default: requests of 500m CPU and 1Gi, or those of the "
        "run if they are less, and its limits.",
    )
    queue_name: QueueName | None = Field(
        None,
        description="For runs without runPolicy.queueName: the queue in which they wait for quota. Default: none.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=MAX_TTL_SECONDS,
        description="For runs without runPolicy.ttlSecondsAfterFinished: seconds after their end until their pods are "
        "deleted. Default: never.",
    )
    egress: EgressRules | None = Field(
        None,
        description="What the pods may reach besides DNS and each other. Empty: nothing. Default: every address and "
        "every pod, but not 169.254.0.0/16 and what else clouds have their metadata at (docs/network.md).",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    identity: Identity | None = Field(
        None,
        description="Where the pods get keys of their cloud: gke (Workload Identity) or eksPodIdentity. Opens that "
        "address to them, and no other one of 169.254.0.0/16. Default: nowhere.",
    )
    limits: Limits = Field(default_factory=Limits, description="What a run may ask for at most.")
    allowed_namespaces: LabelSelector | None = Field(
        None,
        description="Namespaces, by their labels, whose runs may take this runtime. Default: all.",
    )

    cel_rules = store_rules("store")


class RuntimeMeta(ApiModel):
    """The part of Kubernetes' ObjectMeta that the operator reads."""

    model_config = {"extra": "ignore"}

    name: str
    generation: int = 0


class ClusterLoRARuntime(ApiModel):
    """What an administrator settles once for many LoRAFineTunes: image, GPUs, placement, store, defaults and limits."""

    api_version: Literal["lorafinetune.io/v1alpha1"] = API_VERSION
    kind: Literal["ClusterLoRARuntime"] = KIND
    metadata: RuntimeMeta
    spec: ClusterLoRARuntimeSpec = Field(description="What runs get, and what they may ask for.")


def read_taken_runtime(run: LoRAFineTune) -> Reading[ClusterLoRARuntimeSpec]:
    """What the runtime said when ``run`` took it, limits aside; of a run without one, nothing.

    Raises:
        pydantic.ValidationError: the snapshot has a value that this version cannot understand.
    """
    snapshot = run.status.runtime
    return read(ClusterLoRARuntimeSpec, snapshot.spec if snapshot is not None else {})


def taken_runtime(run: LoRAFineTune) -> ClusterLoRARuntimeSpec:
    """The same, as far as it is understood."""
    return read_taken_runtime(run).value
