"""Names and labels of the children: functions of the run's name and the attempt, so that nothing is made twice."""

from lora_api import API_VERSION, GROUP, KIND, LoRAFineTune

MANAGER = "lora-operator"
"""Field manager of every write, and value of the managed-by label."""

RUN_LABEL = f"{GROUP}/name"
ATTEMPT_LABEL = f"{GROUP}/attempt"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"


def child_name(run_name: str, attempt: int) -> str:
    """Name of the Service, ConfigMap and Job of an attempt."""
    return f"{run_name}-{attempt}"


def child_labels(run_name: str, attempt: int) -> dict[str, str]:
    """Labels of every child, its pods included."""
    return {RUN_LABEL: run_name, ATTEMPT_LABEL: str(attempt), MANAGED_BY_LABEL: MANAGER}


def build_metadata(run: LoRAFineTune, attempt: int) -> dict[str, object]:
    """Metadata of a child: it belongs to the run and goes with it."""
    return {
        "name": child_name(run.metadata.name, attempt),
        "namespace": run.metadata.namespace,
        "labels": child_labels(run.metadata.name, attempt),
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
