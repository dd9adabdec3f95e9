"""The ClusterLoRARuntime on the server."""

import json
import re
from typing import Any

import pytest
import yaml

import devcluster
from lora_api import ClusterLoRARuntime, ClusterLoRARuntimeSpec
from tests.support.crd import MAXIMAL_RUNTIME, OTHER_RUNTIME, ROOT, RUNTIME_PATHS, DryRun, has, manifest, place

pytestmark = pytest.mark.controlplane


def test_the_good_runtimes_have_every_field() -> None:
    assert [path for path in RUNTIME_PATHS if not (has(MAXIMAL_RUNTIME, path) or has(OTHER_RUNTIME, path))] == []


@pytest.mark.parametrize("spec", [{}, MAXIMAL_RUNTIME, OTHER_RUNTIME], ids=["empty", "maximal", "other"])
def test_a_good_runtime_comes_back_as_pydantic_reads_it(cp: devcluster.ControlPlane, spec: dict[str, Any]) -> None:
    cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(spec, "kept", "ClusterLoRARuntime")))
    stored = json.loads(cp.kubectl("get", "clr", "kept", "--output=json"))
    cp.kubectl("delete", "clr", "kept")
    assert stored["spec"] == ClusterLoRARuntimeSpec.model_validate(spec).to_wire()
    read = ClusterLoRARuntime.model_validate(stored)
    assert (read.metadata.name, read.metadata.generation) == ("kept", 1)
    assert stored["spec"].items() >= spec.items()
    if spec is MAXIMAL_RUNTIME:
        assert stored["spec"] == spec


BAD: dict[str, tuple[str, Any, str, str]] = {
    "an image with a space": ("image", "lora trainer", "spec.image", "without spaces"),
    "an unknown pull policy": ("imagePullPolicy", "Often", "spec.imagePullPolicy", "supported values"),
    "a GPU without memory": ("gpu", {"name": "H100"}, "spec.gpu.memoryGiB", "Required value"),
    "a GPU of no memory": ("gpu.memoryGiB", 0, "spec.gpu.memoryGiB", "should be greater than 0"),
    "a label that no node can have": ("gpu.nodeSelector", {"a b": "c"}, "spec.gpu.nodeSelector", "NAME or DOMAIN/NAME"),
    "a store on the node's disk": ("store", "file:///out", "spec.store", "must be s3://BUCKET/PREFIX"),
    "a store whose prefix climbs out": ("store", "s3://b/p/..", "spec.store", "may not have . or .."),
    "no grace at all": ("terminationGracePeriodSeconds", 0, "spec.terminationGracePeriodSeconds", "or equal to 1"),
    "more nodes than a run can have": ("limits.maxNodes", 65, "spec.limits.maxNodes", "less than or equal to 64"),
    "fewer GPUs than none": ("limits.maxGPUs", -1, "spec.limits.maxGPUs", "greater than or equal to 0"),
    "no prefix": ("limits.modelUriPrefixes", [], "spec.limits.modelUriPrefixes", "at least 1 items"),
    "a prefix of the web": (
        "limits.dataUriPrefixes",
        ["https://x"],
        "spec.limits.dataUriPrefixes[0]",
        "must begin with hf://",
    ),
    "a prefix twice": ("limits.dataUriPrefixes", ["s3://b", "s3://b"], "spec.limits.dataUriPrefixes[1]", "Duplicate"),
    "GPUs among the resources": (
        "podTemplate.resources.limits",
        {"nvidia.com/gpu": "8"},
        "spec.podTemplate.resources.limits",
        "asked for by parallelism.gpusPerNode",
    ),
    "a secret in the environment": (
        "podTemplate.env",
        [{"name": "HF_TOKEN", "value": "hf_x"}],
        "spec.podTemplate.env[0].name",
        "this is a secret",
    ),
    "a server with a password": (
        "endpoints.store",
        "https://me:secret@s3.example.org",
        "spec.endpoints.store",
        "user and password",
    ),
    "a server of another kind": ("endpoints.hub", "ftp://hub", "spec.endpoints.hub", "must be http://HOST"),
    "no tracker": ("endpoints.tracking", [], "spec.endpoints.tracking", "at least 1 items"),
    "a prefix of stores that is no bucket": (
        "limits.storePrefixes",
        ["s3://"],
        "spec.limits.storePrefixes[0]",
        "must be s3://BUCKET",
    ),
    "an annotation by a part of its name": (
        "limits.annotationNames",
        ["example.org/a*"],
        "spec.limits.annotationNames[0]",
        "DOMAIN/NAME",
    ),
    "a namespace by no value": (
        "allowedNamespaces.matchExpressions",
        [{"key": "team", "operator": "In"}],
        "spec.allowedNamespaces.matchExpressions[0].values",
        "In and NotIn need values",
    ),
    "a network without a prefix": ("egress[0].cidr", "10.0.0.1", "spec.egress[0].cidr", "such as 10.0.0.0/8"),
    "addresses and pods in one rule": ("egress[0].podSelector", {}, "spec.egress[0]", "must have either cidr, or"),
    "a rule for nothing": ("egress", [{"ports": [{"port": 443}]}], "spec.egress[0]", "must have either cidr, or"),
    "an exception of pods": (
        "egress",
        [{"podSelector": {}, "except": ["10.0.0.0/8"]}],
        "spec.egress[0].except",
        "needs cidr",
    ),
    "ports that end before they begin": (
        "egress[0].ports[0].endPort",
        80,
        "spec.egress[0].ports[0].endPort",
        "may not be below port",
    ),
    "a label that no pod can have": (
        "egress",
        [{"podSelector": {"matchLabels": {"a b": "c"}}}],
        "spec.egress[0].podSelector.matchLabels",
        "NAME or DOMAIN/NAME",
    ),
    "a preflight with a device": (
        "preflightResources.limits",
        {"rdma/hca": "1"},
        "spec.preflightResources",
        "cpu, memory and ephemeral-storage only",
    ),
    "an unknown cloud": ("identity", "aks", "spec.identity", "supported values"),
    "an unknown field": ("limits.maxGpus", 8, "spec.limits.maxGpus", "unknown field"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_runtime_is_refused_with_its_field(dry: DryRun, case: str) -> None:
    path, value, field, words = BAD[case]
    code, answer = dry.create_runtime(place(MAXIMAL_RUNTIME, path, value))
    assert code in (400, 422)
    assert field in answer["message"]
    assert words in answer["message"]


def test_a_runtime_can_be_changed_and_people_see_its_limits(cp: devcluster.ControlPlane) -> None:
    cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(MAXIMAL_RUNTIME, "seen", "ClusterLoRARuntime")))
    cp.kubectl("patch", "clr", "seen", "--type=merge", "--patch", '{"spec": {"limits": {"maxNodes": 2}}}')
    header, row = cp.kubectl("get", "clr").splitlines()
    cp.kubectl("delete", "clr", "seen")
    assert re.split(r"  +", header.strip()) == ["NAME", "GPU", "MAX NODES", "MAX GPUS", "STORE", "AGE"]
    assert re.split(r"  +", row)[:5] == ["seen", "NVIDIA H100 80GB", "2", "32", "s3://models/adapters"]


def documented() -> dict[str, dict[str, Any]]:
    """Every ClusterLoRARuntime that a reader may copy."""
    texts = {path: [path.read_text()] for path in (ROOT / "examples" / "runtimes").glob("*.yaml")}
    for path in (ROOT / "docs").rglob("*.md"):
        texts[path] = re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return {
        f"{path.relative_to(ROOT)}:{document['metadata']['name']}": document
        for path, blocks in texts.items()
        for document in (document for block in blocks for document in yaml.safe_load_all(block))
        if isinstance(document, dict) and document.get("kind") == "ClusterLoRARuntime"
    }


DOCUMENTED = documented()


def test_the_default_runtime_of_the_chart_is_good(dry: DryRun) -> None:
    values = yaml.safe_load((ROOT / "charts" / "lora-operator" / "values.yaml").read_text())
    code, answer = dry.create_runtime(values["defaultRuntime"]["spec"], "default")
    assert code == 201, answer["message"]


def test_there_are_runtimes_to_copy() -> None:
    assert {name.partition(":")[0] for name in DOCUMENTED} >= {"examples/runtimes/h100.yaml", "docs/runtimes.md"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_runtime_that_is_shown_to_readers_is_good(dry: DryRun, name: str) -> None:
    document = DOCUMENTED[name]
    code, answer = dry.create_runtime(document["spec"], document["metadata"]["name"])
    assert code == 201, answer["message"]
    assert answer["spec"] == ClusterLoRARuntimeSpec.model_validate(document["spec"]).to_wire()
