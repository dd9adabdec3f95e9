"""What the pods of a run get: resources, placement, environment, Secrets."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from lora_api._base import ApiModel, CelRule

ObjectName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)
]
Quantity = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$", min_length=1, max_length=32),
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]
QUALIFIED_NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
"""Key of a label or a taint: NAME or DOMAIN/NAME."""


class SecretRef(ApiModel):
    """A Secret in the namespace of the resource."""

    name: ObjectName = Field(description="Name of the Secret.")


def _resource_names(field: str) -> CelRule:
    return CelRule(
        rule=f"self.{field}.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || k.startsWith('hugepages-') || "
        "(k.contains('/') && !k.endsWith('.com/gpu')))",
        message=f"{field} may name cpu, memory, ephemeral-storage, hugepages-SIZE or VENDOR/RESOURCE; GPUs are asked "
        "for by parallelism.gpusPerNode",
        field_path=f".{field}",
    )


class ResourceRequirements(ApiModel):
    """Compute resources of each pod. GPUs are added from parallelism.gpusPerNode."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        {}, description="What the scheduler sets aside, such as {cpu: 8, memory: 64Gi}."
    )
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        {}, description="What a pod may use at most. A pod that passes its memory limit is ended (HostOutOfMemory)."
    )

    cel_rules = (
        _resource_names("requests"),
        _resource_names("limits"),
        CelRule(
            rule="self.requests.all(k, !(k in self.limits) || "
            "quantity(self.requests[k]).compareTo(quantity(self.limits[k])) <= 0)",
            message="requests may not be larger than limits",
            field_path=".requests",
        ),
        CelRule(
            rule="self.requests.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || "
            "(k in self.limits && self.limits[k] == self.requests[k]))",
            message="what is asked for of hugepages-SIZE or VENDOR/RESOURCE cannot be shared: it needs the same value "
            "in limits",
            field_path=".requests",
        ),
    )


class Toleration(ApiModel):
    """A taint that the pods accept (the same as in a pod)."""

    key: Annotated[str, StringConstraints(pattern=QUALIFIED_NAME, max_length=316)] | None = Field(
        None, description="Key of the taint. Absent with operator Exists: every taint."
    )
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How key and value are compared.")
    value: LabelValue | None = Field(None, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint. Default: every effect."
    )
    toleration_seconds: int | None = Field(
        None, ge=0, le=31_536_000, description="How long a NoExecute taint is accepted, in seconds. Default: for ever."
    )

    cel_rules = (
        CelRule(
            rule="self.operator == 'Exists' ? !has(self.value) : has(self.key)",
            message="operator Exists takes no value, and operator Equal needs a key",
            field_path=".operator",
        ),
        CelRule(
            rule="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            message="tolerationSeconds needs effect NoExecute",
            field_path=".tolerationSeconds",
        ),
    )


ENV_ALLOWED = r"^(NCCL|GLOO|UCX|FI|RDMAV|OMP|MKL|TORCH|PYTORCH|CUDA|HF|TOKENIZERS|LORA)_[A-Z0-9_]+$"


class EnvVar(ApiModel):
    """One environment variable of the trainer."""

    name: Annotated[str, StringConstraints(pattern=ENV_ALLOWED, max_length=128)] = Field(
        description="Name: one that starts with NCCL_, GLOO_, UCX_, FI_, RDMAV_, OMP_, MKL_, TORCH_, PYTORCH_, "
        "CUDA_, HF_, TOKENIZERS_ or LORA_."
    )
    value: Annotated[str, StringConstraints(max_length=1024)] = Field(description="Value.")

    cel_rules = (
        CelRule(
            rule="self.name != 'HF_TOKEN'",
            message="HF_TOKEN is a secret: put it into the Secret of credentials.secretRef",
            field_path=".name",
        ),
    )


LabelMap = Annotated[dict[str, LabelValue], Field(max_length=32)]
AnnotationMap = Annotated[dict[str, Annotated[str, StringConstraints(max_length=1024)]], Field(max_length=32)]


def qualified_names(field: str) -> CelRule:
    """Refuses a key that Kubernetes would refuse in the pod."""
    return CelRule(
        rule=f"self.{field}.all(k, size(k) <= 316 && k.matches('{QUALIFIED_NAME}'))",
        message=f"a key of {field} must be NAME or DOMAIN/NAME, with at most 63 letters, digits, '-', '_' and '.' in "
        "NAME",
        field_path=f".{field}",
    )


class PodTemplate(ApiModel):
    """What the pods of the gang get. Security settings, volumes and the image are not the user's to choose."""

    resources: ResourceRequirements = Field(
        default_factory=ResourceRequirements, description="CPU, memory and other resources of each pod."
    )
    node_selector: LabelMap = Field({}, description="Labels that a node must have.")
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(
        [], description="Taints that the pods accept.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] = Field(
        [],
        description="Settings of the libraries, such as NCCL_SOCKET_IFNAME. Secrets belong into credentials.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    image_pull_secrets: Annotated[list[SecretRef], Field(max_length=8)] = Field(
        [],
        description="Secrets for the registry of the trainer's image.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    labels: LabelMap = Field({}, description="Labels added to the pods. Keys of this operator cannot be set.")
    annotations: AnnotationMap = Field({}, description="Annotations added to the pods.")

    cel_rules = (
        qualified_names("nodeSelector"),
        qualified_names("labels"),
        qualified_names("annotations"),
        CelRule(
            rule="self.labels.all(k, !k.contains('lorafinetune.io/') && !k.contains('batch.kubernetes.io/'))",
            message="labels with lorafinetune.io/ or batch.kubernetes.io/ belong to the operator",
            field_path=".labels",
        ),
    )
