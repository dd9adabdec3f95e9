"""Requests and limits that do not go together. CEL does not see amounts, so the API server cannot say it. All pure."""

from collections.abc import Iterator, Mapping

from lora_api import ClusterLoRARuntimeSpec
from lora_api.pods import ResourceRequirements
from lora_operator.state.quantities import parse_exactly

_SHARED = ("cpu", "memory", "ephemeral-storage")
"""Resources of which a pod may be promised less than it may use."""


def check_amounts(resources: ResourceRequirements, where: str) -> list[str]:
    """What is wrong with ``resources``, which are at the path ``where``, a sentence for each resource."""
    return list(_check(resources.requests, resources.limits, where))


def check_runtime_amounts(runtime: ClusterLoRARuntimeSpec) -> list[str]:
    """The same for all resources of a runtime."""
    own = runtime.preflight_resources
    return [
        *check_amounts(runtime.pod_template.resources, "spec.podTemplate.resources"),
        *(_check(own.requests or {}, own.limits or {}, "spec.preflightResources") if own else ()),
    ]


def _check(requests: Mapping[str, str], limits: Mapping[str, str], where: str) -> Iterator[str]:
    for name in sorted(requests.keys() & limits.keys()):
        field, asked, most = f"{where}.requests.{name}", requests[name], limits[name]
        if name in _SHARED and parse_exactly(asked) > parse_exactly(most):
            yield f"{field} is {asked}: requests may not be larger than limits ({most})"
        if name not in _SHARED and parse_exactly(asked) != parse_exactly(most):
            yield f"{field} is {asked}: it cannot be shared, so it needs the same value in limits ({most})"
