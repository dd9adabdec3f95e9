"""The headless Service of a run: it gives the pods of its gangs the names under which they find rank 0. Pure.

It is the run's and not an attempt's: its selector is the uid of the run, and the names of two attempts' pods differ.
"""

from typing import Any

from lora_api import LoRAFineTune
from lora_api.run import MASTER_PORT
from lora_operator.names import (
    MANAGED_BY_LABEL,
    MANAGER,
    RUN_LABEL,
    UID_LABEL,
    build_metadata,
    child_name,
    service_name,
)


def needs_service(run: LoRAFineTune) -> bool:
    """Whether the pods of ``run`` have others to find."""
    return run.spec.parallelism.nodes > 1


def build_service(run: LoRAFineTune) -> dict[str, Any]:
    """The Service of ``run``. Names are published before the pods are ready: they need them to get ready."""
    labels = {RUN_LABEL: run.metadata.name, MANAGED_BY_LABEL: MANAGER}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(run, service_name(run.metadata.name), labels),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {UID_LABEL: run.metadata.uid},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP", "targetPort": MASTER_PORT}],
        },
    }


def build_master_address(run: LoRAFineTune, attempt: int) -> str:
    """Where the pods of ``attempt`` find rank 0.

    With the namespace: while rank 0 has no address yet, the resolver goes on with the next search domain, and there
    POD.SERVICE is the Service POD of a namespace that somebody has called SERVICE. A pod alone finds itself, under a
    name that is right with IPv4 and IPv6.
    """
    if not needs_service(run):
        return "localhost"
    name, namespace = run.metadata.name, run.metadata.namespace
    return f"{child_name(name, attempt)}-0.{service_name(name)}.{namespace}.svc"
