"""Where a preflight runs: on a node without GPUs, if there is one for it. Pure."""

from typing import Any

from lora_api import LoRAFineTune
from lora_api.runtime import taken_runtime

GPU_PRESENT = ("nvidia.com/gpu.present", "true")
"""Label that NVIDIA's GPU feature discovery puts on nodes with GPUs."""


_GPU_DOMAIN = "nvidia.com/"
_GPU_LABELS = ("cloud.google.com/gke-accelerator", "k8s.amazonaws.com/accelerator", "kubernetes.azure.com/accelerator")
"""What begins with the first, and the others (of GKE, of EKS and of AKS), only nodes with GPUs have."""


def build_preflight_placement(run: LoRAFineTune) -> dict[str, Any]:
    """The part of a preflight's pod that says which nodes may have it, and which would be better.

    It goes where podTemplate says, but not where gpu.nodeSelector of the runtime does, or where the run itself asks for
    nodes with GPUs. These are only avoided: a cluster may have no others.
    """
    runtime, selector = taken_runtime(run), run.spec.pod_template.node_selector
    gpu = runtime.gpu.node_selector.items() if runtime.gpu else ()
    of_gpus = {*gpu, *((label, value) for label, value in selector.items() if _is_of_gpus(label))}
    only_gpus = of_gpus - runtime.pod_template.node_selector.items()
    avoided = sorted({GPU_PRESENT, *only_gpus})
    return {
        "nodeSelector": {label: value for label, value in selector.items() if (label, value) not in only_gpus},
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


def _is_of_gpus(label: str) -> bool:
    return label.startswith(_GPU_DOMAIN) or label in _GPU_LABELS
