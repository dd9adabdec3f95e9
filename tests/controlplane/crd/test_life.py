"""A LoRAFineTune on the server: what can be changed, who writes what, and what people see."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

import devcluster
from lora_api import LoRAFineTune
from lora_api.crd import RUN
from lora_api.finetune import MUTABLE
from tests.support.api import Api
from tests.support.crd import GONE, MAXIMAL, MINIMAL, PATHS, RUNS, DryRun, has, manifest, place
from tests.support.versions import ENUMS, STATUS_PATHS, knows

pytestmark = pytest.mark.controlplane


def read_run(cp: devcluster.ControlPlane, name: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(cp.kubectl("get", "lft", name, "--output=json"))
    return stored


# A sentence that says the case: the change, and the field that the message names.
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "what follows a failure": ({"runPolicy": {"onOutOfMemory": "shrinkMicroBatch"}}, "runPolicy.onOutOfMemory"),
    "a queue that was absent": ({"runPolicy": {"queueName": "team-a"}}, "runPolicy.queueName"),
    "a priority that was absent": ({"runPolicy": {"priorityClassName": "high"}}, "runPolicy.priorityClassName"),
    "what is deleted": ({"runPolicy": {"ttlDeletes": "run"}}, "runPolicy.ttlDeletes"),
    "credentials that were absent": ({"credentials": {"secretRef": {"name": "store"}}}, "credentials"),
    "a runtime that was absent": ({"runtimeRef": {"name": "h100"}}, "runtimeRef"),
    "placement": ({"podTemplate": {"nodeSelector": {"a": "b"}}}, "podTemplate.nodeSelector"),
    "another value": ({"lora": {"r": 32}}, "lora.r"),
    "another text": ({"training": {"scheduler": "linear"}}, "training.scheduler"),
    "one of two forms": ({"training": {"microBatchSize": 1}}, "training.microBatchSize"),
    "a field that was absent": ({"publish": {"name": "other"}}, "publish.name"),
    "a section below a section": ({"publish": {"gate": {"maxEvalLoss": 1.0}}}, "publish.gate"),
    "what it goes on from": ({"checkpoint": {"resumeFrom": {"name": "a"}}}, "checkpoint.resumeFrom"),
    "how long checkpoints are kept": ({"checkpoint": {"retainHours": 1}}, "checkpoint.retainHours"),
    "a list": ({"lora": {"targetModules": ["q_proj"]}}, "lora.targetModules"),
    "the last field of a section": ({"dataset": {"assistantOnlyLoss": True}}, "dataset.assistantOnlyLoss"),
    "two fields, of which one may be changed": (
        {"runPolicy": {"maxRestarts": 9, "ttlDeletes": "run"}},
        "runPolicy.ttlDeletes",
    ),
    "a required field": ({"training": {"maxSteps": 19}}, "training.maxSteps"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_spec_cannot_be_changed_and_the_field_is_named(cp: devcluster.ControlPlane, living: str, case: str) -> None:
    change, field = CHANGES[case]
    said = re.escape(f"spec.{field} cannot be changed once created: delete this LoRAFineTune")
    with pytest.raises(devcluster.DevclusterError, match=said):
        cp.kubectl("patch", "lft", living, "--type=merge", "--patch", json.dumps({"spec": change}))


def changed(value: Any) -> Iterator[Any]:
    """Other values of the same kind, and none."""
    yield GONE
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value / 2 if isinstance(value, float) else value + 1
    elif isinstance(value, str):
        yield f"{value}x"
    elif isinstance(value, list):
        yield value[1:]
    elif all(isinstance(one, str) for one in value.values()):
        yield {**value, "example.org/other": "1"}


def test_every_field_is_named_down_to_the_last(cp: devcluster.ControlPlane, dry: DryRun) -> None:
    cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(MAXIMAL, "whole")))
    live = read_run(cp, "whole")
    fields = [path for path in PATHS if "[" not in path and ":" not in path and has(MAXIMAL, path)]
    named = 0
    for path in (path for path in fields if not path.startswith("runPolicy")):
        value = functools.reduce(lambda node, part: node[part], path.split("."), MAXIMAL)
        for other in changed(value):
            _, answer = dry.replace(f"{RUNS}/whole", {**live, "spec": place(MAXIMAL, path, other)})
            causes = (answer.get("details") or {}).get("causes", [])
            texts = [cause["message"] for cause in causes if "cannot be changed" in cause["message"]]
            for text in texts:
                assert re.match(rf'Invalid value: ("object": )?spec\.{path}[. ]', text), (path, other, text)
            named += bool(texts)
    cp.kubectl("delete", "lft", "whole")
    assert named > 100


@pytest.mark.parametrize("status", [{}, {"phase": "Starting", "progress": {"step": 1}}], ids=["none", "another"])
def test_the_spec_cannot_be_changed_along_with_the_status(
    cp: devcluster.ControlPlane, living: str, status: dict[str, Any]
) -> None:
    """The rule is not looked at where the status changes, which a write of the spec cannot bring about."""
    if status:
        patch = json.dumps({"status": status})
        cp.kubectl("patch", "lft", living, "--subresource=status", "--type=merge", "--patch", patch)
    before = read_run(cp, living)
    both = {"spec": {"lora": {"r": 32}}, "status": {"phase": "Running", "progress": {"step": 3}}}
    with pytest.raises(devcluster.DevclusterError, match=r"spec\.lora\.r cannot be changed once created"):
        cp.kubectl("patch", "lft", living, "--type=merge", "--patch", json.dumps(both))
    assert read_run(cp, living) == before


def test_what_is_for_changing_can_be_changed(cp: devcluster.ControlPlane, living: str) -> None:
    policy: dict[str, Any] = {
        "suspend": True,
        "retry": 1,
        "maxRestarts": 9,
        "stallTimeoutSeconds": 60,
        "activeDeadlineSeconds": 60,
        "placementTimeoutSeconds": 90,
        "ttlSecondsAfterFinished": 5,
    }
    assert policy.keys() == set(MUTABLE)
    cp.kubectl("patch", "lft", living, "--type=merge", "--patch", json.dumps({"spec": {"runPolicy": policy}}))
    assert policy.items() <= read_run(cp, living)["spec"]["runPolicy"].items()
    gone = {"activeDeadlineSeconds": None, "suspend": False}
    cp.kubectl("patch", "lft", living, "--type=merge", "--patch", json.dumps({"spec": {"runPolicy": gone}}))
    assert "activeDeadlineSeconds" not in read_run(cp, living)["spec"]["runPolicy"]


def test_metadata_can_be_changed_and_the_same_manifest_applied_again(cp: devcluster.ControlPlane, living: str) -> None:
    cp.kubectl("label", "lft", living, "team=support")
    assert "unchanged" in cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(MINIMAL, living)))
    assert read_run(cp, living)["metadata"]["generation"] == 1


def test_status_and_spec_are_written_apart(cp: devcluster.ControlPlane, living: str) -> None:
    both = {"spec": {"lora": {"r": 32}}, "status": {"phase": "Running"}}
    cp.kubectl("patch", "lft", living, "--subresource=status", "--type=merge", "--patch", json.dumps(both))
    stored = read_run(cp, living)
    assert stored["status"]["phase"] == "Running"
    assert stored["spec"]["lora"]["r"] == 16
    assert stored["metadata"]["generation"] == 1
    cp.kubectl("patch", "lft", living, "--type=merge", "--patch", '{"status": {"phase": "Failed"}}')
    assert read_run(cp, living)["status"]["phase"] == "Running"


def test_a_status_of_nonsense_is_refused(cp: devcluster.ControlPlane, living: str) -> None:
    for status, field in (
        ({"phase": "D" * 65}, "status.phase"),
        ({"progress": {"percent": 101}}, "status.progress.percent"),
        ({"progress": {"history": [[1]]}}, r"status.progress.history\[0\]"),
        ({"startTime": "yesterday"}, "status.startTime"),
    ):
        told = field if knows(STATUS_PATHS) else field.removeprefix("status.")
        with pytest.raises(devcluster.DevclusterError, match=rf"\b{told}: "):
            cp.kubectl(
                "patch",
                "lft",
                living,
                "--subresource=status",
                "--type=merge",
                "--patch",
                json.dumps({"status": status}),
            )


def apply_status(cp: devcluster.ControlPlane, name: str, manager: str, status: dict[str, Any]) -> None:
    body = {
        "apiVersion": "lorafinetune.io/v1alpha1",
        "kind": "LoRAFineTune",
        "metadata": {"name": name},
        "status": status,
    }
    # Not by kubectl, which applies to a subresource only from 1.32 on.
    path = f"/apis/lorafinetune.io/v1alpha1/namespaces/default/lorafinetunes/{name}/status?fieldManager={manager}"
    Api(cp.kubeconfig).call("PATCH", path, body, "application/apply-patch+yaml")


def condition(kind: str, status: str) -> dict[str, str]:
    return {"type": kind, "status": status, "reason": "Test", "lastTransitionTime": "2026-11-23T18:00:00Z"}


def test_conditions_of_two_writers_merge_by_type(cp: devcluster.ControlPlane, living: str) -> None:
    apply_status(cp, living, "operator", {"phase": "Running", "conditions": [condition("Ready", "False")]})
    apply_status(cp, living, "another", {"conditions": [condition("Approved", "True")]})
    apply_status(cp, living, "operator", {"phase": "Running", "conditions": [condition("Ready", "True")]})
    stored = LoRAFineTune.model_validate(read_run(cp, living)).status
    assert {entry.type: entry.status for entry in stored.conditions} == {"Ready": "True", "Approved": "True"}


FULL_STATUS: dict[str, Any] = {
    "phase": "Running",
    "reason": "Training",
    "attempt": 2,
    "runtime": {"name": "h100", "generation": 3, "spec": {"image": "trainer:1", "ofALaterVersion": {"x": [1]}}},
    "progress": {
        "step": 9,
        "totalSteps": 18,
        "percent": 50,
        "summary": "50%",
        "loss": 0.5123,
        "eta": "1m20s",
        "tokensPerSecond": 1234.5,
        "history": [[1, 3.25], [9, 0.5123]],
    },
    "adapter": {
        "uri": "s3://models/adapters/default/living/sha256-0",
        "digest": "sha256:0",
        "version": 1,
        "servedName": "living-v1",
        "rank": 16,
        "servingMaxLoraRank": 16,
        "sizeBytes": 1,
    },
}


def test_the_columns_are_what_people_see(cp: devcluster.ControlPlane, living: str) -> None:
    apply_status(cp, living, "operator", FULL_STATUS)
    header, row = cp.kubectl("get", "lft", living).splitlines()
    assert header.split() == ["NAME", "PHASE", "PROGRESS", "LOSS", "ETA", "ADAPTER", "AGE"]
    assert row.split()[:-1] == ["living", "Running", "50%", "0.5123", "1m20s", "living-v1"]
    wide, row = cp.kubectl("get", "lft", living, "--output=wide").splitlines()
    assert re.split(" {2,}", wide.strip())[1:] == [str(column["name"]).upper() for column in RUN.columns]
    assert row.split()[-7:] == ["9", "1234.5", "1", "2", MINIMAL["baseModel"]["uri"], "h100", "Training"]
    assert "living" in cp.kubectl("get", "all")


def test_a_status_comes_back_as_it_was_written(cp: devcluster.ControlPlane, living: str) -> None:
    apply_status(cp, living, "operator", FULL_STATUS)
    status = LoRAFineTune.model_validate(read_run(cp, living)).status
    assert status.to_wire() == {
        **FULL_STATUS,
        "version": 1,
        "observedGeneration": 0,
        "conditions": [],
        "failures": [],
        "failedPreflights": 0,
        "chargedRestarts": 0,
        "preemptions": 0,
        "suspendedAttempt": 0,
        "activeSeconds": 0,
        "gpuSeconds": 0,
    }


def test_explain_shows_a_field_with_its_text(cp: devcluster.ControlPlane) -> None:
    text = " ".join(cp.kubectl("explain", "lft.spec.training").split())
    assert "maxGradNorm <number> Gradients are scaled down to this L2 norm" in text
    assert "in one forward pass, 1 to 1024." in text
    text = " ".join(cp.kubectl("explain", "lft.spec.training.scheduler").split())
    assert ("ENUM: constant linear cosine" if knows(ENUMS) else "Course of the learning rate") in text


def test_describe_shows_a_remedy_to_a_newcomer(cp: devcluster.ControlPlane, living: str) -> None:
    failure = {
        "attempt": 1,
        "class": "BadData",
        "message": "train.jsonl: record 17 has no messages",
        "remedy": "Correct the records.",
        "at": "2026-11-23T18:00:00Z",
    }
    apply_status(cp, living, "operator", {"phase": "Failed", "failures": [failure]})
    text = cp.kubectl("describe", "lft", living)
    assert "train.jsonl: record 17 has no messages" in text
    assert "Correct the records." in text
