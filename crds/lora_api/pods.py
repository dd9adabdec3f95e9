"""What the pods of a run get: resources, placement, environment, Secrets."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints
from pydantic.config import JsonDict

from lora_api import patterns
from lora_api._base import ApiModel, CelRule
from lora_api.environment import HARMLESS, SECRETS

ObjectName = Annotated[str, StringConstraints(pattern=patterns.OBJECT_NAME, min_length=1, max_length=253)]
LabelValue = Annotated[str, StringConstraints(pattern=patterns.LABEL_VALUE, max_length=63)]


def _to_text(value: Any) -> Any:
    """A number as text: ``cpu: 0.5`` is a number in YAML, and means the same as ``cpu: "0.5"``, as in any pod."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# A structural schema has no type for "a number or text": x-kubernetes-int-or-string refuses 0.5. Without a type each
# bound holds for values of its own kind. CEL cannot look into such a value, so that no rule can say what is wrong with
# it: the pattern begins with the words, as a form that no text has (nothing comes before its beginning).
_QUANTITY_SCHEMA: JsonDict = {
    "x-kubernetes-preserve-unknown-fields": True,
    "pattern": f"a quantity such as 4, 500m or 64Gi^|{patterns.QUANTITY}",
    "maxLength": 32,
    "minimum": 0,
    "maxItems": 0,
    "maxProperties": 0,
    "not": {"enum": [False, True, [], {}]},
}

Quantity = Annotated[
    str,
    BeforeValidator(_to_text),
    StringConstraints(pattern=patterns.QUANTITY, max_length=32),
    Field(json_schema_extra=_QUANTITY_SCHEMA),
]
"""An amount as Kubernetes writes it. Numbers become text here, so nobody behind this border sees one."""


class SecretRef(ApiModel):
    """A Secret in the namespace of the resource."""

    name: ObjectName = Field(description="Name of the Secret.")


def _resource_names(field: str) -> CelRule:
    # dyn: CEL has no type for a map whose values have none, but knows its keys when it comes to it.
    return CelRule(
        rule=f"dyn(self).{field}.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || k.startsWith('hugepages-') || "
        "(k.contains('/') && !k.endsWith('.com/gpu')))",
        message="may name cpu, memory, ephemeral-storage, hugepages-SIZE or VENDOR/RESOURCE; GPUs are asked for by "
        "parallelism.gpusPerNode",
        field_path=f".{field}",
    )


class ResourceRequirements(ApiModel):
    """Compute resources of each pod. GPUs are added from parallelism.gpusPerNode."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        {}, description="What the scheduler sets aside, such as {cpu: 8, memory: 64Gi}. At most as much as in limits."
    )
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        {}, description="What a pod may use at most. One that passes its memory limit is ended."
    )

    cel_rules = (
        _resource_names("requests"),
        _resource_names("limits"),
        CelRule(
            rule="dyn(self).requests.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || k in dyn(self).limits)",
            message="hugepages-SIZE and VENDOR/RESOURCE cannot be shared: each needs the same value in limits",
            field_path=".requests",
        ),
    )


_PREFLIGHT_NAMES = "k in ['cpu', 'memory', 'ephemeral-storage']"


class PreflightResources(ApiModel):
    """Compute resources of a preflight."""

    requests: Annotated[dict[str, Quantity], Field(max_length=3)] | None = Field(
        None, description="What the scheduler sets aside of cpu, memory and ephemeral-storage. At most limits."
    )
    limits: Annotated[dict[str, Quantity], Field(max_length=3)] | None = Field(
        None, description="What the pod may use of them at most."
    )

    cel_rules = (
        CelRule(
            rule=f"(!has(dyn(self).requests) || dyn(self).requests.all(k, {_PREFLIGHT_NAMES})) && "
            f"(!has(dyn(self).limits) || dyn(self).limits.all(k, {_PREFLIGHT_NAMES}))",
            message="a preflight asks for cpu, memory and ephemeral-storage only",
        ),
    )


class Toleration(ApiModel):
    """A taint that the pods accept (the same as in a pod)."""

    key: Annotated[str, StringConstraints(pattern=patterns.QUALIFIED_NAME, max_length=316)] | None = Field(
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


VariableName = Annotated[str, StringConstraints(pattern=patterns.VARIABLE_NAME, max_length=128)]
VariableValue = Annotated[str, StringConstraints(max_length=1024)]


def _one_of(names: Iterable[str]) -> str:
    """A regular expression for exactly ``names``, with what they begin with written once: the list is long."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, mark, tail = name.partition("_")
        groups.setdefault(head + mark, []).append(tail)
    return "|".join(
        head + (tails[0] if len(tails) == 1 else f"({_one_of(tails) if all(tails) else '|'.join(tails)})")
        for head, tails in groups.items()
    )


_NO_SECRET = CelRule(
    rule=f"!self.name.matches('^({_one_of(SECRETS)})$')",
    message="this is a secret, which everybody could read here: put it into the Secret of credentials.secretRef",
    field_path=".name",
)


class EnvVar(ApiModel):
    """One environment variable of the trainer."""

    name: VariableName = Field(
        description="One of those in docs/reference.md, such as NCCL_SOCKET_IFNAME. Any other can be set by a "
        "ClusterLoRARuntime only."
    )
    value: VariableValue = Field(description="Value.")

    cel_rules = (
        _NO_SECRET,
        CelRule(
            rule=f"self.name.matches('^({_one_of((*HARMLESS, *SECRETS))})$')",
            message="a run may set only the variables that docs/reference.md lists; any other can be set by "
            "podTemplate.env "
            "of a ClusterLoRARuntime",
            field_path=".name",
        ),
    )


class RuntimeEnvVar(ApiModel):
    """One environment variable of the trainer, set by an administrator."""

    name: VariableName = Field(description="Name. Any but those of secrets.")
    value: VariableValue = Field(description="Value.")

    cel_rules = (_NO_SECRET,)


LabelMap = Annotated[dict[str, LabelValue], Field(max_length=32)]
AnnotationMap = Annotated[dict[str, Annotated[str, StringConstraints(max_length=1024)]], Field(max_length=32)]


def qualified_names(field: str) -> CelRule:
    """Refuses a key that Kubernetes would refuse in the pod."""
    return CelRule(
        rule=f"self.{field}.all(k, size(k) <= 316 && k.matches('{patterns.QUALIFIED_NAME}'))",
        message=f"a key of {field} must be NAME or DOMAIN/NAME: letters, digits, '-', '_' and '.'",
        field_path=f".{field}",
    )


class PodPlumbing(ApiModel):
    """What a run and a runtime say of pods in the same way."""

    resources: ResourceRequirements = Field(
        default_factory=ResourceRequirements, description="CPU, memory and other resources of each pod."
    )
    node_selector: LabelMap = Field({}, description="Labels that a node must have.")
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(
        [], description="Taints that the pods accept.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    image_pull_secrets: Annotated[list[SecretRef], Field(max_length=8)] = Field(
        [],
        description="Secrets for the registry of the trainer's image.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    labels: LabelMap = Field(
        {},
        description="Labels of the pods. A run may set those that limits.labelNames of its runtime lists.",
    )
    annotations: AnnotationMap = Field(
        {},
        description="Annotations of the pods. A run may set those that limits.annotationNames of its runtime lists.",
    )

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


_BY_NAME: JsonDict = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


class PodTemplate(PodPlumbing):
    """What the pods of the gang get. Security settings, volumes and the image are not the user's to choose."""

    env: Annotated[list[EnvVar], Field(max_length=64)] = Field(
        [],
        description="Settings of the libraries, such as NCCL_SOCKET_IFNAME. Secrets belong into credentials.",
        json_schema_extra=_BY_NAME,
    )


class RuntimePodTemplate(PodPlumbing):
    """What the pods of every run under this runtime get."""

    env: Annotated[list[RuntimeEnvVar], Field(max_length=64)] = Field(
        [],
        description="Any variables of the pods but secrets. The endpoints of this runtime win over them.",
        json_schema_extra=_BY_NAME,
    )
