"""Code that somebody left where a run can write, in a pod of the real image as the operator makes it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo import stack
from devcluster import Cluster
from lora_api import LoRAFineTune
from lora_api.run import PVC_ROOT
from lora_operator.children.job import build_job
from lora_operator.settings import Settings
from tests.security import imports_probe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NAMESPACE, POD, CLAIM = "lora-security", "planted", "models"
LOG = "/scratch/planted.log"
RUN = {
    "metadata": {"name": "planted", "namespace": NAMESPACE, "uid": "u-1"},
    "spec": {
        "baseModel": {"uri": f"pvc://{CLAIM}/model"},
        "dataset": {"train": {"uri": f"pvc://{CLAIM}/data.jsonl"}},
        "training": {"maxSteps": 1},
        "parallelism": {"nodes": 1, "gpusPerNode": 0},
        "publish": {"store": "s3://adapters"},
    },
}


def build_pod(image: str) -> dict[str, Any]:
    """The pod that the operator would make, with the probe in place of the trainer and a volume in place of the claim.

    Before it starts, every directory that it can write to or has mounted is filled with modules.
    """
    text = Path(imports_probe.__file__).read_text()
    job = build_job(LoRAFineTune.model_validate(RUN), 1, Settings(trainer_image=image))
    template = job["spec"]["template"]
    spec = template["spec"]
    [container] = spec["containers"]
    claim = f"{PVC_ROOT}/{CLAIM}"
    mounts = [mount | {"readOnly": False} for mount in container["volumeMounts"] if mount["name"] != "run"]
    assert claim in [mount["mountPath"] for mount in mounts]
    hostile = [
        {"name": "HF_HOME", "value": f"{claim}/hf"},
        {"name": "HF_MODULES_CACHE", "value": f"{claim}/hf/modules"},
    ]
    flags = container["command"][: container["command"].index("-m")]
    container |= {
        "command": [*flags, "-c", text],
        "args": ["check", LOG, "/opt/app"],
        "env": [*container["env"], *hostile],
        "volumeMounts": mounts,
    }
    planter = {**container, "name": "plant", "args": ["plant", LOG, *(mount["mountPath"] for mount in mounts)]}
    kept = [volume for volume in spec["volumes"] if volume["name"] != "run"]
    volumes = [volume if "emptyDir" in volume else {"name": volume["name"], "emptyDir": {}} for volume in kept]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD, "namespace": NAMESPACE},
        "spec": spec | {"initContainers": [planter], "volumes": volumes},
    }


@pytest.fixture
def log(cluster: Cluster, images: dict[str, Any]) -> Iterator[str]:
    """What the pod said, once it has ended."""
    stack.make_namespace(cluster, NAMESPACE)
    delete = ("delete", "pod", POD, f"--namespace={NAMESPACE}", "--ignore-not-found", "--grace-period=1")
    cluster.kubectl(*delete)
    stack.apply(cluster, build_pod(f"{images['trainer.image.repository']}:{images['trainer.image.tag']}"))
    ended = "--for=jsonpath={.status.containerStatuses[0].state.terminated.exitCode}"
    cluster.kubectl("wait", ended, f"pod/{POD}", f"--namespace={NAMESPACE}", "--timeout=400s", timeout=420)
    yield cluster.kubectl("logs", POD, f"--namespace={NAMESPACE}")
    cluster.kubectl(*delete)


def test_a_pod_imports_nothing_but_its_image(log: str) -> None:
    """Attack: A USER'S RUN leaves modules on a claim, in scratch, /tmp, /dev/shm, $HOME and the hub's cache."""
    found = json.loads(log.splitlines()[-1])
    assert {kind: names for kind, names in found.items() if names} == {}
