"""Names of runs that a child cannot have, and of fields that there are not."""

import json
import re

import pytest

import devcluster
from lora_api.training import LoRA
from tests.support.crd import (
    MAXIMAL,
    MINIMAL,
    DryRun,
    manifest,
    place,
)

pytestmark = pytest.mark.controlplane


NAMES = {
    "53 characters": ("a" * 53, "metadata.name may have at most 52 characters"),
    "a digit first": ("8b", "metadata.name must start with a letter"),
    "a dot": ("a.b", "metadata.name must start with a letter and have only"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_a_child_cannot_have_is_refused(dry: DryRun, case: str) -> None:
    name, words = NAMES[case]
    code, answer = dry.create_run(MINIMAL, name)
    assert code == 422
    assert words in answer["message"]


def test_the_longest_name_is_legal_for_every_child(dry: DryRun) -> None:
    name = "a" * 52
    assert dry.create_run(MINIMAL, name)[0] == 201
    child = {"name": f"{name}-999"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": child,
        "spec": {
            "completionMode": "Indexed",
            "completions": 64,
            "parallelism": 64,
            "backoffLimitPerIndex": 0,
            "template": {
                "metadata": {"labels": {"lorafinetune.io/name": name}},
                "spec": {
                    "restartPolicy": "Never",
                    "subdomain": child["name"],
                    "containers": [{"name": "c", "image": "i"}],
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child,
        "spec": {"clusterIP": "None", "ports": [{"port": 29500}]},
    }
    for path, body in (
        ("/apis/batch/v1/namespaces/default/jobs", job),
        ("/api/v1/namespaces/default/services", service),
    ):
        code, answer = dry.create(path, body)
        assert code == 201, answer


UNKNOWN = {
    "a field of another name": ("lora.rank", 8),
    "a field at the top": ("model", "x"),
    "a field in a list": ("podTemplate.env[0].valueFrom", {}),
    "a security context": ("podTemplate.securityContext", {"privileged": True}),
    "a host path": ("podTemplate.volumes", [{"hostPath": {"path": "/"}}]),
    "a service account": ("podTemplate.serviceAccountName", "admin"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_field_is_refused_by_its_name(cp: devcluster.ControlPlane, case: str) -> None:
    path, value = UNKNOWN[case]
    body = json.dumps(manifest(place(MAXIMAL, path, value)))
    with pytest.raises(devcluster.DevclusterError, match=re.escape(f'unknown field "spec.{path}"')):
        cp.kubectl("apply", "--filename=-", "--dry-run=server", input=body)


def test_an_unknown_field_is_dropped_without_validation(cp: devcluster.ControlPlane) -> None:
    body = json.dumps(manifest(place(MINIMAL, "lora.rank", 8), "pruned"))
    cp.kubectl("apply", "--filename=-", "--validate=false", input=body)
    stored = json.loads(cp.kubectl("get", "lft", "pruned", "--output=json"))
    assert stored["spec"]["lora"] == LoRA().to_wire()
