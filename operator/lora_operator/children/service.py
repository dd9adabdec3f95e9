"""The headless Service: it gives the pods of an attempt the names under which they find rank 0."""

from typing import Any

from lora_api import LoRAFineTune
from lora_api.run import MASTER_PORT
from lora_operator.names import JOB_NAME_LABEL, build_metadata, child_labels, child_name


def build_service(run: LoRAFineTune, attempt: int) -> dict[str, Any]:
    """The Service of ``attempt``. Names are published before the pods are ready: they need them to get ready."""
    name = child_name(run.metadata.name, attempt)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(run, name, child_labels(run.metadata.name, attempt)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_NAME_LABEL: name},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP", "targetPort": MASTER_PORT}],
        },
    }
