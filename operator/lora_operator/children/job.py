"""The Indexed Job: one pod a node, started together, each index tried once.

``backoffLimitPerIndex: 0`` lets every pod end by itself and keep its log; with ``backoffLimit: 0`` the Job controller
deletes the peers of a failed pod about a second later, and their last words with them (KEP-3850).
"""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lora_api import LoRAFineTune
from lora_api.pods import PodTemplate
from lora_api.run import CONTAINER_NAME, MASTER_PORT, PVC_ROOT, RUN_FILE, TERMINATION_LOG, WORK_DIRECTORY
from lora_operator.children.names import INDEX_LABEL, build_metadata, child_labels, child_name
from lora_operator.settings import Settings

COMMAND = ["/opt/lora/bin/python", "-m", "lora_trainer"]
USER_ID = 65532
GPU_RESOURCE = "nvidia.com/gpu"

STOP_MARGIN_SECONDS = 10
"""What the trainer leaves of the grace period to the kubelet, after its last checkpoint."""


def build_job(run: LoRAFineTune, attempt: int, settings: Settings) -> dict[str, Any]:
    """The Job of ``attempt``."""
    nodes = run.spec.parallelism.nodes
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": build_metadata(run, attempt),
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimitPerIndex": 0,
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {
                    "labels": run.spec.pod_template.labels | child_labels(run.metadata.name, attempt),
                    "annotations": run.spec.pod_template.annotations,
                },
                "spec": _pod_spec(run, attempt, settings),
            },
        },
    }


def _pod_spec(run: LoRAFineTune, attempt: int, settings: Settings) -> dict[str, Any]:
    """What passes Pod Security ``restricted``, holds no credentials of the cluster and writes to scratch only."""
    template = run.spec.pod_template
    claims = claims_of(run)
    return {
        "restartPolicy": "Never",
        "subdomain": child_name(run.metadata.name, attempt),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "nodeSelector": template.node_selector,
        "tolerations": [toleration.to_wire() for toleration in template.tolerations],
        "imagePullSecrets": [secret.to_wire() for secret in template.image_pull_secrets],
        "containers": [_container(run, attempt, settings, claims)],
        "volumes": [
            {"name": "run", "configMap": {"name": child_name(run.metadata.name, attempt)}},
            {"name": "work", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *(
                {"name": volume, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
                for claim, volume in claims.items()
            ),
        ],
    }


def _container(run: LoRAFineTune, attempt: int, settings: Settings, claims: Mapping[str, str]) -> dict[str, Any]:
    credentials = run.spec.credentials
    return {
        "name": CONTAINER_NAME,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy,
        "command": COMMAND,
        "args": ["launch", RUN_FILE],
        "env": _env(run, attempt, settings),
        "envFrom": [{"secretRef": credentials.secret_ref.to_wire()}] if credentials else [],
        "resources": _resources(run),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_LOG,
        # Not FallbackToLogsOnError: a killed trainer has no last words, and a piece of its log is no termination
        # message. The operator reads the log itself.
        "terminationMessagePolicy": "File",
        "volumeMounts": [
            {"name": "run", "mountPath": str(PurePosixPath(RUN_FILE).parent), "readOnly": True},
            {"name": "work", "mountPath": WORK_DIRECTORY},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            *(
                {"name": volume, "mountPath": f"{PVC_ROOT}/{claim}", "readOnly": True}
                for claim, volume in claims.items()
            ),
        ],
    }


def _env(run: LoRAFineTune, attempt: int, settings: Settings) -> list[dict[str, Any]]:
    """Rendezvous and library settings; what the user sets in podTemplate.env wins over the library settings."""
    parallelism = run.spec.parallelism
    name = child_name(run.metadata.name, attempt)
    own = {
        "MASTER_ADDR": f"{name}-0.{name}",
        "MASTER_PORT": str(MASTER_PORT),
        "PET_MASTER_ADDR": f"{name}-0.{name}",
        "PET_MASTER_PORT": str(MASTER_PORT),
        "PET_NNODES": str(parallelism.nodes),
        "PET_NPROC_PER_NODE": str(parallelism.processes_per_node),
        "PET_RDZV_BACKEND": "static",
    }
    libraries = {
        "HF_HOME": f"{WORK_DIRECTORY}/hf",
        "HOME": WORK_DIRECTORY,
        "LORA_STOP_GRACE_SECONDS": str(max(settings.termination_grace - STOP_MARGIN_SECONDS, 1)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    if not uses_hub(run):
        libraries["HF_HUB_OFFLINE"] = "1"
    threads = omp_threads(run.spec.pod_template, parallelism.processes_per_node, on_cpu=parallelism.gpus_per_node == 0)
    if threads is not None:
        libraries["OMP_NUM_THREADS"] = str(threads)
    libraries |= {variable.name: variable.value for variable in run.spec.pod_template.env}
    rank = {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX_LABEL}']"}}}
    return [rank, *({"name": key, "value": value} for key, value in sorted((libraries | own).items()))]


def _resources(run: LoRAFineTune) -> dict[str, dict[str, str]]:
    resources = run.spec.pod_template.resources
    gpus = run.spec.parallelism.gpus_per_node
    extra = {GPU_RESOURCE: str(gpus)} if gpus else {}
    return {"requests": dict(resources.requests), "limits": resources.limits | extra}


def omp_threads(template: PodTemplate, processes: int, *, on_cpu: bool) -> int | None:
    """Threads for each process, from the pod's CPU limit or request.

    Without either: 1 on a CPU, where the pods of a gang often share a machine; torchrun's own choice with GPUs.
    """
    resources = template.resources
    text = resources.limits.get("cpu") or resources.requests.get("cpu")
    if text is None:
        return 1 if on_cpu else None
    cores = Decimal(text[:-1]) / 1000 if text.endswith("m") else Decimal(text.rstrip("kMGTPEi"))
    return max(1, int(cores / processes))


def uses_hub(run: LoRAFineTune) -> bool:
    """Whether anything comes from a model hub."""
    return any(uri.startswith("hf://") for uri in _uris(run))


def claims_of(run: LoRAFineTune) -> dict[str, str]:
    """Claims of pvc:// URIs, with the names of their volumes, each once and in a fixed order."""
    claims = sorted({urlsplit(uri).netloc for uri in _uris(run) if uri.startswith("pvc://")})
    return {claim: f"claim-{number}" for number, claim in enumerate(claims)}


def _uris(run: LoRAFineTune) -> list[str]:
    dataset = run.spec.dataset
    return [run.spec.base_model.uri, dataset.train.uri, *([dataset.eval.uri] if dataset.eval else [])]
