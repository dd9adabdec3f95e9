"""The pod template that all pods of a run share: what passes Pod Security ``restricted`` and writes to scratch only."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lora_api import LoRAFineTune
from lora_api.run import CONTAINER_NAME, PVC_ROOT, RUN_FILE, TERMINATION_LOG, WORK_DIRECTORY
from lora_operator.children.names import UID_LABEL
from lora_operator.settings import Settings

COMMAND = ["/opt/lora/bin/python", "-P", "-s", "-m", "lora_trainer"]
"""-P and -s: no code from the current directory, which is scratch, or below $HOME, whatever the environment says."""

USER_ID = 65532


def build_pod_template(
    run: LoRAFineTune,
    settings: Settings,
    *,
    name: str,
    labels: dict[str, str],
    args: Sequence[str],
    env: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """The template of pods whose ConfigMap and, if they have one, Service have ``name``.

    They hold no credentials of the cluster.
    """
    template = run.spec.pod_template
    claims = claims_of(run)
    return {
        "metadata": {
            "labels": template.labels | labels | {UID_LABEL: run.metadata.uid},
            "annotations": template.annotations,
        },
        "spec": {
            "restartPolicy": "Never",
            "subdomain": name,
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
            "containers": [_container(run, settings, args, env, resources, claims)],
            "volumes": [
                {"name": "run", "configMap": {"name": name}},
                {"name": "work", "emptyDir": {}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
                *(
                    {"name": volume, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
                    for claim, volume in claims.items()
                ),
            ],
        },
    }


def _container(
    run: LoRAFineTune,
    settings: Settings,
    args: Sequence[str],
    env: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Mapping[str, str]],
    claims: Mapping[str, str],
) -> dict[str, Any]:
    credentials = run.spec.credentials
    return {
        "name": CONTAINER_NAME,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy,
        "command": COMMAND,
        "args": list(args),
        "env": list(env),
        "envFrom": [{"secretRef": credentials.secret_ref.to_wire()}] if credentials else [],
        "resources": resources,
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


def library_env(run: LoRAFineTune) -> dict[str, str]:
    """Settings of the libraries; what the user sets in podTemplate.env wins over them."""
    libraries = {
        "HF_HOME": f"{WORK_DIRECTORY}/hf",
        "HOME": WORK_DIRECTORY,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    return libraries if uses_hub(run) else libraries | {"HF_HUB_OFFLINE": "1"}


def user_env(run: LoRAFineTune) -> dict[str, str]:
    """What the user sets in podTemplate.env."""
    return {variable.name: variable.value for variable in run.spec.pod_template.env}


def to_env(values: Mapping[str, str]) -> list[dict[str, Any]]:
    """``values`` as a container's env, in a fixed order."""
    return [{"name": key, "value": value} for key, value in sorted(values.items())]


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
