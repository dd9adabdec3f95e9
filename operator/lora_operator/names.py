"""Names and labels of the children: functions of the run's name and the attempt, so that nothing is made twice."""

from collections.abc import Mapping

from lora_api import API_VERSION, GROUP, KIND, LoRAFineTune

MANAGER = "lora-operator"
"""Field manager of every write, and value of the managed-by label."""

RUN_LABEL = f"{GROUP}/name"
UID_LABEL = f"{GROUP}/uid"
"""On pods alone: a name may be that of an earlier run, and a NetworkPolicy selects by this one."""

ATTEMPT_LABEL = f"{GROUP}/attempt"
PREFLIGHT_LABEL = f"{GROUP}/preflight"
RUN_VERSION_ANNOTATION = f"{GROUP}/run-version"
"""On a Job: newest run document that its trainer reads, where that is not 1."""

RUN_ANNOTATION = f"{GROUP}/run"
"""On pods: the run document, which they have as a file through the downward API."""

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
CONTROLLER_LABEL = "batch.kubernetes.io/controller-uid"


def child_name(run_name: str, attempt: int) -> str:
    """Name of the Job of an attempt, and of its PodGroup."""
    return f"{run_name}-{attempt}"


def preflight_name(run_name: str, number: int) -> str:
    """Name of the Job of a preflight. No attempt of any run has it: those end in a hyphen and digits."""
    return f"{run_name}-pre{number}"


def service_name(run_name: str) -> str:
    """Name of the Service of a run. Not the run's own, under which people serve what comes of it."""
    return f"{run_name}-gang"


def child_labels(run_name: str, attempt: int) -> dict[str, str]:
    """Labels of every child of an attempt, its pods included."""
    return {RUN_LABEL: run_name, ATTEMPT_LABEL: str(attempt), MANAGED_BY_LABEL: MANAGER}


def preflight_labels(run_name: str, number: int) -> dict[str, str]:
    """Labels of every child of a preflight, its pod included."""
    return {RUN_LABEL: run_name, PREFLIGHT_LABEL: str(number), MANAGED_BY_LABEL: MANAGER}


def build_metadata(run: LoRAFineTune, name: str, labels: Mapping[str, str]) -> dict[str, object]:
    """Metadata of a child: it belongs to the run and goes with it."""
    return {
        "name": name,
        "namespace": run.metadata.namespace,
        "labels": dict(labels),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": run.metadata.name,
                "uid": run.metadata.uid,
                "controller": True,
            }
        ],
    }
