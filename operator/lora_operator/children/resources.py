"""What the containers of a run ask for. Pure.

A preflight asks for little, so that it finds room while the run itself would not. Namespaces have rules that look at
each container: a ResourceQuota on limits.* wants limits, a LimitRange gives a container without limits its own, which
may be less than what the container asks for, and has a most and a least. So a preflight names what the gang names, has
the limits of the gang, and never asks for more than the gang does.
"""

from lora_api import LoRAFineTune
from lora_api.runtime import taken_runtime
from lora_operator.state.quantities import largest, smallest

GPU_RESOURCE = "nvidia.com/gpu"

OF_EVERY_CONTAINER = ("cpu", "memory", "ephemeral-storage")
"""Resources that a quota may ask for of every container; devices are the trainer's alone."""

_REQUESTS = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
_LIMITS = {"cpu": "4", "memory": "8Gi"}
"""What a preflight asks for at most, and may take where the run says nothing of it."""

Resources = dict[str, dict[str, str]]


def gang_resources(run: LoRAFineTune) -> Resources:
    """Those of the trainer in a pod of the gang."""
    resources = run.spec.pod_template.resources
    gpus = run.spec.parallelism.gpus_per_node
    extra = {GPU_RESOURCE: str(gpus)} if gpus else {}
    return {"requests": dict(resources.requests), "limits": resources.limits | extra}


def preflight_resources(run: LoRAFineTune) -> Resources:
    """Those of a preflight: what preflightResources of the runtime says, and of the rest what follows from the run."""
    own = taken_runtime(run).preflight_resources
    requests, limits = (dict(own.requests or {}), dict(own.limits or {})) if own else ({}, {})
    gang = run.spec.pod_template.resources
    for name in OF_EVERY_CONTAINER:
        asked, most = gang.requests.get(name), gang.limits.get(name)
        if name not in _LIMITS and not (asked or most or name in requests or name in limits):
            continue
        if name not in requests:
            requests[name] = smallest(_REQUESTS[name], asked, most, limits.get(name))
        if name not in limits and (most or name in _LIMITS):
            limits[name] = largest(most or largest(_LIMITS[name], asked), requests[name])
    return {"requests": requests, "limits": limits}
