"""Where a preflight runs: on a node without GPUs, if there is one for it. Pure."""

from typing import Any

from lora_api import LoRAFineTune
from lora_api.runtime import taken_runtime

GPU_PRESENT = ("nvidia.com/gpu.present", "true")
"""Label that NVIDIA's GPU feature discovery puts on nodes with GPUs."""


def build_preflight_placement(run: LoRAFineTune) -> dict[str, Any]:
    """The part of a preflight's pod that says which nodes may have it, and which would be better.

    It goes where podTemplate says, but not where gpu.nodeSelector of the runtime does. Nodes with GPUs are only
    avoided: a cluster may have no others.
    """
    runtime, selector = taken_runtime(run), run.spec.pod_template.node_selector
    gpu = runtime.gpu.node_selector if runtime.gpu else {}
    kept = runtime.pod_template.node_selector.items()
    avoided = sorted({GPU_PRESENT, *(gpu.items() - kept)})
    return {
        "nodeSelector": {label: value for label, value in selector.items() if (label, value) not in gpu.items() - kept},
        "affinity": {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "preference": {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]},
                    }
                    for key, value in avoided
                ]
            }
        },
    }
