"""PodGroups: they tell a gang scheduler to start all pods of an attempt or none. Pure.

Volcano and the coscheduling plugin of scheduler-plugins each have a kind of this name. A pod says to which group it
belongs by an annotation (Volcano) or a label (coscheduling), and by the name of its scheduler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lora_api import LoRAFineTune
from lora_operator.names import build_metadata, child_labels, child_name
from lora_operator.settings import RunSettings
from lora_operator.state.quantities import parse_exactly


@dataclass(frozen=True)
class GangScheduler:
    """How a scheduler is told of a gang. ``mark_in`` is the part of a pod's metadata that holds ``mark``."""

    api_version: str
    mark_in: str
    mark: str
    scheduler_name: str


GANG_SCHEDULERS: Mapping[str, GangScheduler] = {
    "volcano": GangScheduler("scheduling.volcano.sh/v1beta1", "annotations", "scheduling.k8s.io/group-name", "volcano"),
    "coscheduling": GangScheduler(
        "scheduling.x-k8s.io/v1alpha1", "labels", "scheduling.x-k8s.io/pod-group", "scheduler-plugins-scheduler"
    ),
}


def build_podgroup(
    run: LoRAFineTune, attempt: int, template: Mapping[str, Any], settings: RunSettings
) -> dict[str, Any]:
    """The PodGroup of ``attempt``, whose pods are made from ``template``.

    Raises:
        KeyError: the operator works with no gang scheduler.
    """
    scheduler = GANG_SCHEDULERS[settings.gang_scheduler]
    name, nodes = child_name(run.metadata.name, attempt), run.spec.parallelism.nodes
    spec: dict[str, Any] = {"minMember": nodes, "minResources": _resources_of(template, nodes)}
    policy = run.spec.run_policy
    if settings.gang_scheduler == "volcano":
        spec |= {"queue": policy.queue_name} if policy.queue_name else {}
        spec |= {"priorityClassName": policy.priority_class_name} if policy.priority_class_name else {}
    return {
        "apiVersion": scheduler.api_version,
        "kind": "PodGroup",
        "metadata": build_metadata(run, name, child_labels(run.metadata.name, attempt)),
        "spec": spec,
    }


def join_gang(template: dict[str, Any], name: str, settings: RunSettings) -> None:
    """Makes pods of ``template`` members of the PodGroup ``name``, where there is a gang scheduler."""
    scheduler = GANG_SCHEDULERS.get(settings.gang_scheduler)
    if scheduler is not None:
        metadata = template["metadata"]
        metadata[scheduler.mark_in] = {**metadata[scheduler.mark_in], scheduler.mark: name}
        template["spec"]["schedulerName"] = settings.scheduler_name or scheduler.scheduler_name


def _resources_of(template: Mapping[str, Any], nodes: int) -> dict[str, str]:
    """What ``nodes`` pods ask for together. A limit without a request is one (Kubernetes does the same)."""
    resources = template["spec"]["containers"][0]["resources"]
    asked = {**resources["limits"], **resources["requests"]}
    return {name: multiply_quantity(quantity, nodes) for name, quantity in sorted(asked.items())}


def multiply_quantity(quantity: str, factor: int) -> str:
    """A Kubernetes quantity such as ``500m`` or ``1.5Gi`` times ``factor``."""
    quantity = quantity.removeprefix("+")
    number = "".join(takewhile(lambda character: character.isdigit() or character == ".", quantity))
    return f"{parse_exactly(number) * factor:f}{quantity[len(number) :]}"
