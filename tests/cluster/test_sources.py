"""A base model and data on a volume, in real pods."""

from collections.abc import Iterator
from typing import Any

import pytest

from demo import stack
from lora_api import Phase
from tests.cluster.conftest import TINY_DATA, TINY_MODEL
from tests.cluster.runs import Runs, find_condition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("preflight")]

CLAIM = "tiny-claim"
FILL = """
import sys
from pathlib import Path
from lora_trainer.store import Store
for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    Store(source).download_directory("", Path("/claim") / target)
"""
USER_ID = 65532


@pytest.fixture
def claim(runs: Runs, images: dict[str, Any]) -> Iterator[str]:
    """A claim with the tiny model in model/ and its data in data/, which a pod has written there from the store.

    Clusters that are started here make no volumes: theirs is a folder of the node. A cluster of ``$KUBECONFIG`` has to
    have a default StorageClass, whose volumes can be written by a pod's fsGroup and mounted by all pods of a node.
    """
    name = f"{runs.namespace}-{CLAIM}"
    remove(runs, name)
    spec: dict[str, Any] = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    if not runs.cluster.external:
        folder = runs.cluster.directory / "tests" / CLAIM
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # fsGroup is not for folders of the node
        volume = {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {"namespace": runs.namespace, "name": CLAIM},
            "hostPath": {"path": str(folder), "type": "Directory"},
        }
        stack.apply(
            runs.cluster, {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume}
        )
        spec |= {"storageClassName": "", "volumeName": name}
    metadata = {"name": CLAIM, "namespace": runs.namespace}
    stack.apply(runs.cluster, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
    stack.apply(runs.cluster, writer(runs, f"{images['trainer.image.repository']}:{images['trainer.image.tag']}"))
    runs.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", f"pod/{CLAIM}", "--timeout=180s", timeout=200)
    yield CLAIM
    runs.remove()
    remove(runs, name)


def remove(runs: Runs, volume: str) -> None:
    """Deletes pod, claim and volume, where there are any."""
    runs.kubectl("delete", "pod", CLAIM, "--ignore-not-found", "--grace-period=1")
    runs.kubectl("delete", "persistentvolumeclaim", CLAIM, "--ignore-not-found")
    runs.cluster.kubectl("delete", "persistentvolume", volume, "--ignore-not-found")


def writer(runs: Runs, image: str) -> dict[str, Any]:
    """A pod that copies model and data from the store to the claim."""
    sources = [runs.store.uri(TINY_MODEL), "model", runs.store.uri(TINY_DATA), "data"]
    container = {
        "name": "writer",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/opt/lora/bin/python", "-c", FILL, *sources],
        "envFrom": [{"secretRef": {"name": stack.SECRET}}],
        "env": [{"name": "AWS_ENDPOINT_URL", "value": runs.cluster.s3_endpoint}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "claim", "mountPath": "/claim"}],
    }
    spec = {
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": CLAIM}}],
    }
    metadata = {"name": CLAIM, "namespace": runs.namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def test_model_and_data_of_a_volume_train(runs: Runs, claim: str) -> None:
    name = runs.submit(
        "from-claim",
        baseModel={"uri": f"pvc://{claim}/model"},
        dataset={"train": {"uri": f"pvc://{claim}/data/good.jsonl"}},
    )

    run = runs.wait_end(name)

    assert run.status.phase == Phase.SUCCEEDED
    assert run.status.adapter is not None
    for pod in runs.pods(name):
        mounts = {mount["mountPath"]: mount for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts[f"/mnt/pvc/{claim}"]["readOnly"]


def test_a_claim_that_does_not_exist_is_said_at_once(runs: Runs) -> None:
    name = runs.submit("no-claim", baseModel={"uri": "pvc://forgotten-claim/model"})

    run = runs.wait(
        name, "a condition names the claim", lambda run: "forgotten-claim" in str(run.status.conditions), 60
    )

    assert run.status.phase == Phase.PREFLIGHT
    condition = find_condition(run, "PreflightPassed")
    assert condition.status == "False"
    assert "forgotten-claim" in condition.message
    assert "Create the claim" in condition.message, "the remedy is missing"
    assert run.status.failures == []
