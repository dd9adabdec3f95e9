"""What the containers of a run ask for. Pure.

A preflight asks for little, so that it finds room while the run itself would not. Namespaces have rules that look at
each container: a ResourceQuota on limits.* wants limits, a LimitRange gives a container without limits its own, and has
a most, a least and a ratio of the two. What the gang may have is therefore all that a preflight goes by: it names what
the gang names and nothing else, has its limits, and never asks for more. A least or a ratio may still forbid that it
asks for less. Then it asks for what the gang does.
"""

from lora_api import LoRAFineTune
from lora_api.runtime import taken_runtime
from lora_operator.state.facts import asks_as_the_gang
from lora_operator.state.quantities import largest, smallest

GPU_RESOURCE = "nvidia.com/gpu"

OF_EVERY_CONTAINER = ("cpu", "memory", "ephemeral-storage")
"""Resources that a quota may ask for of every container; devices are the trainer's alone."""

_ENOUGH = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
"""What a preflight asks for at most, where the run asks for more."""

Resources = dict[str, dict[str, str]]


def gang_resources(run: LoRAFineTune) -> Resources:
    """Those of the trainer in a pod of the gang."""
    resources = run.spec.pod_template.resources
    gpus = run.spec.parallelism.gpus_per_node
    extra = {GPU_RESOURCE: str(gpus)} if gpus else {}
    return {"requests": dict(resources.requests), "limits": resources.limits | extra}


def preflight_resources(run: LoRAFineTune) -> Resources:
    """Those of a preflight: what preflightResources of the runtime says, and of the rest what follows from the run."""
    if asks_as_the_gang(run.status):
        return gang_resources_on_cpu(run)
    own = taken_runtime(run).preflight_resources
    requests, limits = (dict(own.requests or {}), dict(own.limits or {})) if own else ({}, {})
    gang = run.spec.pod_template.resources
    for name in OF_EVERY_CONTAINER:
        asked, most = gang.requests.get(name), gang.limits.get(name)
        if name not in requests and (asked or most or name in limits):
            requests[name] = smallest(_ENOUGH[name], asked, most, limits.get(name))
        if name not in limits and most:
            limits[name] = largest(most, requests[name])
    return {"requests": requests, "limits": limits}


def gang_resources_on_cpu(run: LoRAFineTune) -> Resources:
    """What a pod of the gang asks for, but for its GPUs and other devices."""
    resources = run.spec.pod_template.resources
    return {
        kind: {name: value for name, value in asked.items() if name in OF_EVERY_CONTAINER}
        for kind, asked in (("requests", resources.requests), ("limits", resources.limits))
    }
