"""The pod template that all pods of a run share: what passes Pod Security ``restricted`` and writes to scratch only."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lora_api import LoRAFineTune
from lora_api.pods import SecretRef
from lora_api.run import CONTAINER_NAME, PVC_ROOT, RUN_FILE, TERMINATION_LOG, WORK_DIRECTORY
from lora_operator.children.environment import source_uris
from lora_operator.children.resources import OF_EVERY_CONTAINER
from lora_operator.names import RUN_ANNOTATION, UID_LABEL
from lora_operator.settings import RunSettings

COMMAND = ["/opt/lora/bin/python", "-P", "-s", "-m", "lora_trainer"]
"""-P and -s: no code from the current directory, which is scratch, or below $HOME, whatever the environment says."""

USER_ID = 65532

_RUN_ITEM = {
    "path": PurePosixPath(RUN_FILE).name,
    "fieldRef": {"fieldPath": f"metadata.annotations['{RUN_ANNOTATION}']"},
}


def build_pod_template(
    run: LoRAFineTune,
    settings: RunSettings,
    *,
    document: str,
    labels: dict[str, str],
    args: Sequence[str],
    env: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """The template of pods that are told ``document``. They hold no credentials of the cluster."""
    template = run.spec.pod_template
    claims, credentials = claims_of(run), run.spec.credentials
    return {
        "metadata": {
            "labels": template.labels | labels | {UID_LABEL: run.metadata.uid},
            "annotations": template.annotations | {RUN_ANNOTATION: document},
        },
        "spec": {
            "restartPolicy": "Never",
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
            **({"initContainers": [_build_gate(credentials.secret_ref, settings, resources)]} if credentials else {}),
            "containers": [_container(settings, args, env, resources, claims)],
            "volumes": [
                {"name": "run", "downwardAPI": {"items": [_RUN_ITEM]}},
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
    settings: RunSettings,
    args: Sequence[str],
    env: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Mapping[str, str]],
    claims: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "name": CONTAINER_NAME,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy,
        "command": COMMAND,
        "args": list(args),
        "env": list(env),
        "resources": resources,
        "securityContext": _restricted(),
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


def claims_of(run: LoRAFineTune) -> dict[str, str]:
    """Claims of pvc:// URIs, with the names of their volumes, each once and in a fixed order."""
    claims = sorted({urlsplit(uri).netloc for uri in source_uris(run) if uri.startswith("pvc://")})
    return {claim: f"claim-{number}" for number, claim in enumerate(claims)}


def _build_gate(secret: SecretRef, settings: RunSettings, resources: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """An init container that does nothing, and cannot start while the run's Secret is missing.

    Keys may be missing one by one, and a container whose keys are all optional starts without the Secret, too. So this
    one takes the whole Secret, under names that no program knows, and is gone before the trainer starts.
    """
    own = {kind: {name: value for name, value in values.items() if name in OF_EVERY_CONTAINER}
           for kind, values in resources.items()}  # fmt: skip
    return {
        "name": "credentials",
        "image": settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy,
        "command": [COMMAND[0], "-I", "-S", "-c", ""],
        "envFrom": [{"prefix": "UNUSED_", "secretRef": secret.to_wire()}],
        "resources": own,
        "securityContext": _restricted(),
    }


def _restricted() -> dict[str, Any]:
    """What Pod Security ``restricted`` asks of a container, and a root that cannot be written to."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
