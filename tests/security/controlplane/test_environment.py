"""What a manifest or a Secret tries to bring into the environment of the pods."""

import base64
from typing import Any

import pytest

from lora_api.environment import SECRET_KEYS
from tests.support.api import Api, ApiError, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run

pytestmark = pytest.mark.controlplane

CODE = {
    "HF_HOME": "/mnt/pvc/planted",
    "HF_MODULES_CACHE": "/mnt/pvc/planted",
    "HF_HUB_OFFLINE": "0",
    "CUDA_INJECTION64_PATH": "/mnt/pvc/planted/evil.so",
    "NCCL_NET_PLUGIN": "/mnt/pvc/planted/evil.so",
    "NCCL_TOPO_FILE": "/mnt/pvc/planted/topo.xml",
    "OMP_TOOL_LIBRARIES": "/mnt/pvc/planted/evil.so",
    "UCX_MODULE_DIR": "/mnt/pvc/planted",
    "TORCH_LOGS": "+planted.module",
    "LORA_WORK": "/mnt/pvc/planted",
    "PYTHONPATH": "/mnt/pvc/planted",
    "LD_PRELOAD": "/mnt/pvc/planted/evil.so",
}
SERVERS = {
    "HF_ENDPOINT": "http://attacker.test",
    "AWS_ENDPOINT_URL": "http://attacker.test",
    "HTTPS_PROXY": "http://attacker.test",
    "NCCL_COMM_ID": "attacker.test:1",
}


def variables(**values: str) -> dict[str, Any]:
    return {"env": [{"name": name, "value": value} for name, value in values.items()]}


def environment(pod: Raw) -> dict[str, Raw]:
    """The trainer's variables by name; nothing comes into it in another way."""
    [container] = pod["spec"]["containers"]
    assert "envFrom" not in container
    return {entry["name"]: entry for entry in container["env"]}


@pytest.mark.parametrize("name", [*CODE, *SERVERS])
def test_a_variable_that_loads_code_or_names_a_server(run: Run, name: str) -> None:
    """Attack: a user of a namespace sets a variable by which a library loads code, reads files or asks a server.

    The API server refuses it, and says who may set it.
    """
    value = (CODE | SERVERS)[name]
    with pytest.raises(ApiError, match=r"spec.podTemplate.env\[0\].name.*of a ClusterLoRARuntime") as refused:
        run.create(lambda spec: spec.update(podTemplate=variables(**{name: value})))
    assert refused.value.status == 422


def test_keys_of_a_secret_that_are_no_credentials(api: Api, run: Run, operator: OperatorThread) -> None:
    """Attack: somebody who may write a Secret puts keys into it that would load code or name another server."""
    planted = {"PYTHONPATH": "/evil", "LD_PRELOAD": "/evil.so", "AWS_ENDPOINT_URL": "http://attacker.test"}
    data = {name: base64.b64encode(value.encode()).decode() for name, value in {**planted, "HF_TOKEN": "x"}.items()}
    api.create(f"/api/v1/namespaces/{run.namespace}/secrets", {"metadata": {"name": "store"}, "data": data})
    run.create(lambda spec: spec.update(credentials={"secretRef": {"name": "store"}}))
    for attempt in (1, 2):
        for pod in run.gang(attempt):
            found = environment(pod)
            assert not planted.keys() & found.keys()
            taken = {name for name, entry in found.items() if "secretKeyRef" in entry.get("valueFrom", {})}
            assert taken == set(SECRET_KEYS)
            [gate] = pod["spec"]["initContainers"]
            assert (gate["command"][1:], gate["envFrom"][0]["prefix"]) == (["-I", "-S", "-c", ""], "UNUSED_")
            # What the API server itself mounts into pods is not there either: automountServiceAccountToken is false.
            assert not gate.get("volumeMounts")
        run.set_failed(attempt, "StoreUnavailable", 74)


def test_a_secret_in_the_place_of_a_value(run: Run, operator: OperatorThread) -> None:
    """Attack: a user who may not read Secrets writes ``$(KEY)`` where the trainer repeats the value in the status."""
    values = {"LORA_SPEED": "$(AWS_SECRET_ACCESS_KEY)", "NCCL_DEBUG": "$$(HF_TOKEN)"}
    run.create(lambda spec: spec.update(credentials={"secretRef": {"name": "store"}}, podTemplate=variables(**values)))
    found = environment(run.gang(1)[0])
    # Kubernetes: "Double $$ are reduced to a single $, which allows for escaping the $(VAR_NAME) syntax".
    assert found["LORA_SPEED"]["value"] == "$$(AWS_SECRET_ACCESS_KEY)"
    assert found["NCCL_DEBUG"]["value"] == "$$$$(HF_TOKEN)"
