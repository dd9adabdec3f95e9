"""What the CRD takes comes back as pydantic reads it, and is taken by the kinds of the children."""

import json
import re
from typing import Any

import pytest
import yaml

import devcluster
from lora_api import RUN_VERSION, LoRAFineTune, LoRAFineTuneSpec
from lora_operator.children.job import build_job
from lora_operator.children.service import build_service
from lora_operator.settings import Settings
from tests.support.crd import GONE, MAXIMAL, MINIMAL, OTHERWISE, PATHS, ROOT, DryRun, Spec, has, manifest, place

pytestmark = pytest.mark.controlplane


def test_the_maximal_manifest_has_every_field() -> None:
    missing = [path for path in PATHS if not has(MAXIMAL, path)]
    dpo = ["training.dpo", "training.dpo.beta", "training.dpo.loss", "training.dpo.labelSmoothing"]
    assert missing == ["dataset.evalFraction", *dpo, "training.epochs"]
    assert all(has(OTHERWISE, path) for path in missing)


@pytest.mark.parametrize("spec", [MINIMAL, MAXIMAL, OTHERWISE], ids=["minimal", "maximal", "otherwise"])
def test_a_good_manifest_comes_back_as_pydantic_reads_it(cp: devcluster.ControlPlane, spec: Spec) -> None:
    cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(spec, "kept")))
    stored = json.loads(cp.kubectl("get", "lft", "kept", "--output=json"))
    cp.kubectl("delete", "lft", "kept")
    assert stored["spec"] == LoRAFineTuneSpec.model_validate(spec).to_wire()
    read = LoRAFineTune.model_validate(stored)
    assert read.spec == LoRAFineTuneSpec.model_validate(spec)
    assert read.metadata.name == "kept"
    assert read.metadata.generation == 1
    if spec is MAXIMAL:
        assert stored["spec"] == spec


# What a field needs beside it.
COMPANIONS: dict[str, tuple[str, Any]] = {
    "parallelism.shardSize": ("parallelism", {"strategy": "hsdp", "gpusPerNode": 8}),
    "runPolicy.workloadPriorityClassName": ("runPolicy", {"queueName": "team-a"}),
    "parallelism.strategy": ("parallelism", {"shardSize": 4, "gpusPerNode": 8}),
}


def test_every_default_is_the_same_on_both_sides(dry: DryRun) -> None:
    """Also where a section is given in part, so that the API server fills in the rest."""
    for path, node in PATHS.items():
        if "properties" in node and "default" in node:
            for name in node["properties"]:
                if has(MAXIMAL, f"{path}.{name}"):
                    value = MAXIMAL
                    for part in f"{path}.{name}".split("."):
                        value = value[part]
                    spec = {**MINIMAL, "training": {"maxSteps": 1, "globalBatchSize": 48}}
                    if f"{path}.{name}" in COMPANIONS:
                        spec = place(spec, *COMPANIONS[f"{path}.{name}"])
                    spec = place(spec, f"{path}.{name}", value)
                    code, answer = dry.create_run(spec)
                    assert code == 201, answer["message"]
                    assert answer["spec"] == LoRAFineTuneSpec.model_validate(spec).to_wire(), path


LONGEST = "a" * 63

# Values of a field of the pod that are only just legal.
WIDEST: dict[str, list[Any]] = {
    "podTemplate.labels": [{f"{'d' * 61}.example.org/{LONGEST}": LONGEST}, {"A_b.c-D": ""}],
    "podTemplate.annotations": [{"example.org/x": "any text, {braces}\n and \u4e16"}],
    "podTemplate.nodeSelector": [{LONGEST: LONGEST}],
    "podTemplate.tolerations": [
        [{"operator": "Exists"}, {"key": f"example.org/{LONGEST}", "value": LONGEST, "effect": "PreferNoSchedule"}]
    ],
    "podTemplate.resources": [
        {"requests": {"cpu": "500m"}, "limits": {"cpu": "0.5"}},
        {"limits": {"hugepages-2Mi": "1Gi", "memory": "2Gi", "example.org/nic": "2"}},
        {"requests": {"memory": "1000M"}, "limits": {"memory": "1G"}},
    ],
    "podTemplate.env": [[{"name": "NCCL_DEBUG", "value": ""}]],
    "runPolicy": [{"queueName": LONGEST, "workloadPriorityClassName": LONGEST, "priorityClassName": "a.b-c"}],
    "credentials": [{"secretRef": {"name": "a.b-c"}}],
    "baseModel.uri": ["pvc://claim.with.dots/a/b"],
}


@pytest.mark.parametrize(("path", "number"), [(path, number) for path in WIDEST for number in range(len(WIDEST[path]))])
def test_what_the_crd_takes_the_kinds_of_the_children_take(dry: DryRun, path: str, number: int) -> None:
    """Otherwise a run would be accepted, and its Job refused where nobody looks."""
    spec = place(place(MAXIMAL, "baseModel.revision", GONE), path, WIDEST[path][number])
    code, answer = dry.create_run(spec, "a" * 52)
    assert code == 201, answer["message"]
    answer["metadata"]["uid"] = "0b3e1b4e-0000-4000-8000-000000000000"
    run = LoRAFineTune.model_validate(answer)
    for kind, body in (
        ("/api/v1/namespaces/default/services", build_service(run)),
        ("/apis/batch/v1/namespaces/default/jobs", build_job(run, 999, Settings(), RUN_VERSION, "0f" * 32)),
    ):
        code, answer = dry.create(kind, body)
        assert code == 201, answer["message"]


def documented() -> dict[str, dict[str, Any]]:
    """Every LoRAFineTune that a reader may copy: whole files in examples/, and blocks of the documents."""
    found = {}
    texts = {path: [path.read_text()] for path in (ROOT / "examples").glob("*.yaml")}
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        texts[path] = re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    for path, blocks in texts.items():
        for document in (document for block in blocks for document in yaml.safe_load_all(block)):
            if isinstance(document, dict) and document.get("kind") == "LoRAFineTune":
                found[f"{path.relative_to(ROOT)}:{document['metadata']['name']}"] = document
    return found


DOCUMENTED = documented()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_manifest_that_is_shown_to_readers_is_good(dry: DryRun, name: str) -> None:
    document = DOCUMENTED[name]
    code, answer = dry.create_run(document["spec"], document["metadata"]["name"])
    assert code == 201, answer["message"]
    assert answer["spec"] == LoRAFineTuneSpec.model_validate(document["spec"]).to_wire()
