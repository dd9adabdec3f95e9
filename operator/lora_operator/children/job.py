"""The Indexed Jobs: the gang, one pod a node, started together, each index tried once; and the preflight's one pod.

``backoffLimitPerIndex: 0`` lets every pod end by itself and keep its log; with ``backoffLimit: 0`` the Job controller
deletes the peers of a failed pod about a second later, and their last words with them (KEP-3850).
"""

from collections.abc import Mapping
from typing import Any

from lora_api import LoRAFineTune
from lora_api.pods import PodTemplate
from lora_api.run import MASTER_PORT, RUN_FILE
from lora_operator.children.affinity import keep_away, lean_away
from lora_operator.children.document import build_document, build_preflight_document
from lora_operator.children.environment import build_env
from lora_operator.children.placement import build_preflight_placement
from lora_operator.children.pod import build_pod_template
from lora_operator.children.podgroup import build_podgroup, join_gang
from lora_operator.children.resources import gang_resources, preflight_resources
from lora_operator.children.service import build_master_address, needs_service
from lora_operator.names import (
    INDEX_LABEL,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    RUN_VERSION_ANNOTATION,
    build_metadata,
    child_labels,
    child_name,
    preflight_labels,
    preflight_name,
    service_name,
)
from lora_operator.settings import RunSettings
from lora_operator.state.quantities import parse_exactly
from lora_operator.state.workload import uses_kueue

STOP_MARGIN_SECONDS = 10
"""What the trainer leaves of the grace period to the kubelet, after its last checkpoint."""


def build_gang(
    run: LoRAFineTune, attempt: int, settings: RunSettings, run_version: int = 1, control_key: str | None = None
) -> list[dict[str, Any]]:
    """The Job of ``attempt``, behind its PodGroup where there is a gang scheduler.

    ``run_version`` is the newest run document that the trainer reads.
    """
    job = _annotate(build_job(run, attempt, settings, run_version, control_key), run_version)
    if settings.gang_scheduler == "none":
        return [job]
    return [build_podgroup(run, attempt, job["spec"]["template"], settings), job]


def build_job(
    run: LoRAFineTune, attempt: int, settings: RunSettings, run_version: int = 1, control_key: str | None = None
) -> dict[str, Any]:
    """The Job of ``attempt``. One that names a queue of Kueue is made suspended, and Kueue lets it go."""
    name, labels = child_name(run.metadata.name, attempt), child_labels(run.metadata.name, attempt)
    template = build_pod_template(
        run, settings, document=build_document(run, attempt, run_version, control_key), labels=labels,
        args=["launch", RUN_FILE], env=_gang_env(run, attempt, settings), resources=gang_resources(run),
    )  # fmt: skip
    if needs_service(run):
        template["spec"]["subdomain"] = service_name(run.metadata.name)
    policy = run.spec.run_policy
    if policy.priority_class_name:
        template["spec"]["priorityClassName"] = policy.priority_class_name
    join_gang(template, name, settings)
    template = keep_away(template, run.status.avoided_nodes or [])
    if not uses_kueue(policy.queue_name, settings):
        return _build(run, name, labels, run.spec.parallelism.nodes, template)
    labels |= queue_labels(run)
    job = _build(run, name, labels, run.spec.parallelism.nodes, template)
    job["spec"]["suspend"] = True
    return job


def build_preflight_job(run: LoRAFineTune, number: int, settings: RunSettings, run_version: int = 1) -> dict[str, Any]:
    """The Job of a preflight: one pod without a GPU, with the credentials that the run would have.

    It takes no queue: it needs no GPU, and a run that cannot work does not wait for one.
    """
    name, labels = preflight_name(run.metadata.name, number), preflight_labels(run.metadata.name, number)
    template = build_pod_template(
        run, settings, document=build_preflight_document(run), labels=labels, args=["preflight", RUN_FILE],
        env=build_env(run, {}), resources=preflight_resources(run),
    )  # fmt: skip
    template["spec"] |= build_preflight_placement(run)
    template = lean_away(template, run.status.avoided_nodes or [])
    return _annotate(_build(run, name, labels, 1, template), run_version)


def queue_labels(run: LoRAFineTune) -> dict[str, str]:
    """What tells Kueue in which queue a Job of ``run`` waits, and before which others."""
    policy = run.spec.run_policy
    queue = {QUEUE_LABEL: policy.queue_name, QUEUE_PRIORITY_LABEL: policy.workload_priority_class_name}
    return {label: value for label, value in queue.items() if value}


def _annotate(job: dict[str, Any], run_version: int) -> dict[str, Any]:
    """Puts on ``job`` what its trainer reads: an operator that is cut off before it writes that down finds it here."""
    if run_version > 1:
        job["metadata"]["annotations"] = {RUN_VERSION_ANNOTATION: str(run_version)}
    return job


def _build(
    run: LoRAFineTune, name: str, labels: dict[str, str], pods: int, template: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": build_metadata(run, name, labels),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimitPerIndex": 0,
            "podReplacementPolicy": "Failed",
            "template": template,
        },
    }


def _gang_env(run: LoRAFineTune, attempt: int, settings: RunSettings) -> list[dict[str, Any]]:
    """Rendezvous and library settings."""
    parallelism, address = run.spec.parallelism, build_master_address(run, attempt)
    own = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(MASTER_PORT),
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": str(MASTER_PORT),
        "PET_NNODES": str(parallelism.nodes),
        "PET_NODE_RANK": {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX_LABEL}']"}}},
        "PET_NPROC_PER_NODE": str(parallelism.processes_per_node),
        "PET_RDZV_BACKEND": "static",
    }
    libraries = {"LORA_STOP_GRACE_SECONDS": str(max(settings.termination_grace - STOP_MARGIN_SECONDS, 1))}
    threads = omp_threads(run.spec.pod_template, parallelism.processes_per_node, on_cpu=parallelism.gpus_per_node == 0)
    if threads is not None:
        libraries["OMP_NUM_THREADS"] = str(threads)
    return build_env(run, own, libraries)


def omp_threads(template: PodTemplate, processes: int, *, on_cpu: bool) -> int | None:
    """Threads for each process, from the pod's CPU limit or request.

    Without either: 1 on a CPU, where the pods of a gang often share a machine; torchrun's own choice with GPUs.
    """
    resources = template.resources
    text = resources.limits.get("cpu") or resources.requests.get("cpu")
    if text is None:
        return 1 if on_cpu else None
    return max(1, int(parse_exactly(text) / processes))
