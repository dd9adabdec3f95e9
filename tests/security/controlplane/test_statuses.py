"""Statuses and last words that were made to look like another run's."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_api import AdapterStatus
from lora_api.messages import parse_progress_line, parse_termination
from lora_operator.objects import Raw
from lora_operator.settings import Settings
from lora_operator.status.claims import find_foreign
from lora_operator.watched.views import parse_pod
from tests.support.api import Api
from tests.support.operators import OperatorThread
from tests.support.runs import SPEC, Run, adapter_of, ended, now, termination
from tests.support.wait import eventually
from tests.unit.operator.builders import a_run

controlplane = pytest.mark.controlplane


def claim(**changes: Any) -> AdapterStatus:
    return AdapterStatus.model_validate({**adapter_of("team", "tickets"), **changes})


STORE = "s3://models/adapters"
HERE = f"sha256-{'a' * 64}"
CLAIMS: dict[str, tuple[dict[str, Any], bool]] = {
    "its own": ({}, True),
    "its own, with the merged model": ({"mergedUri": f"{STORE}/team/tickets/merged/{HERE}"}, True),
    "another namespace's": ({"uri": f"{STORE}/other/tickets/{HERE}"}, False),
    "another run's": ({"uri": f"{STORE}/team/other/{HERE}"}, False),
    "in another store": ({"uri": f"s3://elsewhere/adapters/team/tickets/{HERE}"}, False),
    "in a store whose name begins alike": ({"uri": f"{STORE}-2/team/tickets/{HERE}"}, False),
    "by a way out": ({"uri": f"{STORE}/team/tickets/../../other/x/{HERE}"}, False),
    "with another digest": ({"digest": f"sha256:{'b' * 64}"}, False),
    "with a way out as its digest": ({"digest": "../../x", "uri": f"{STORE}/team/tickets/../../x"}, False),
    "with the merged model of another run": ({"mergedUri": f"{STORE}/team/other/merged/{HERE}"}, False),
    "under another run's name": ({"servedName": "other-v1"}, False),
    "under another version's name": ({"servedName": "tickets-v2"}, False),
    "at an address": ({"uri": "https://attacker.example/adapter"}, False),
    "nowhere": ({"uri": ""}, False),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_run_publishes_below_its_own_prefix(case: str) -> None:
    """Attack: last words or a status name the adapter of another run."""
    changes, own = CLAIMS[case]
    assert (find_foreign(a_run(), claim(**changes)) is None) is own


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_uri_elsewhere_passes(start: str, end: str) -> None:
    """Attack: last words name a URI that holds the run's own prefix somewhere."""
    own = str(adapter_of("team", "tickets")["uri"])
    for uri in (start + own + end, own + end, start + own):
        assert (find_foreign(a_run(), claim(uri=uri)) is None) is (uri == own)


HUGE = "9" * 30


@pytest.mark.parametrize("field", ["step", "rank", "microBatchSize"])
def test_a_number_that_no_status_can_hold_is_no_word(field: str) -> None:
    """Attack: last words or a progress line have a number of 30 digits: every write of the status would fail."""
    at = '"at":"2026-11-23T18:00:00Z"'
    assert parse_termination(f'{{"outcome":"failed","class":"Internal",{at},"{field}":{HUGE}}}') is None
    assert parse_termination(f'{{"outcome":"failed","class":"Internal",{at},"{field}":7}}') is not None
    assert parse_progress_line(f'{{"lora":{{"event":"step",{at},"step":{HUGE},"totalSteps":{HUGE}}}}}') is None


def a_pod(labels: dict[str, str], owners: list[Raw], **more: str) -> Raw:
    ours = {
        "lorafinetune.io/name": "run",
        "lorafinetune.io/attempt": "1",
        "batch.kubernetes.io/job-completion-index": "0",
    }
    metadata = {"namespace": "n", "name": "p", "uid": "u", "resourceVersion": "1", "labels": ours | labels, **more}
    return {"metadata": metadata | {"ownerReferences": owners}}


CONTAINER = {
    "name": "any",
    "image": "any",
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}

JOB_OWNER = {"kind": "Job", "name": "run-1", "uid": "job-uid", "controller": True}
LABEL = {"batch.kubernetes.io/controller-uid": "job-uid"}
PODS: dict[str, tuple[Raw, str]] = {
    "one that the Job controller made": (a_pod(LABEL, [JOB_OWNER]), "job-uid"),
    "one that its owner was orphaned from": (a_pod(LABEL, [], generateName="run-1-0-"), "job-uid"),
    "a copied label without an owner": (a_pod(LABEL, []), ""),
    "our labels alone": (a_pod({}, []), ""),
    "a copied owner reference": (a_pod({}, [JOB_OWNER]), ""),
    "a copied label below another owner": (a_pod(LABEL, [{**JOB_OWNER, "uid": "other"}]), ""),
}


@pytest.mark.parametrize("case", PODS)
def test_a_pod_is_of_the_gang_where_the_job_controller_counts_it(case: str) -> None:
    """Attack: who may create pods gives one the labels or the owner reference of a gang's."""
    raw, want = PODS[case]
    assert parse_pod(raw).job_uid == want


# -- on a real API server


def finished(adapter: Raw) -> Raw:
    """A status as it stands in a copy of a run that succeeded."""
    condition = {"status": "True", "reason": "Succeeded", "lastTransitionTime": now(), "observedGeneration": 1}
    conditions = [{"type": kind, **condition, "message": "done"} for kind in ("Ready", "Published", "Complete")]
    return {"phase": "Succeeded", "attempt": 2, "conditions": conditions, "adapter": adapter, "completionTime": now()}


def put_status(api: Api, run: Run, status: Raw) -> None:
    api.patch(f"{run.path}/{run.name}/status", {"status": status})


@controlplane
def test_a_status_in_a_manifest_is_dropped(api: Api, run: Run, operator: OperatorThread) -> None:
    """Attack: who may create runs copies a finished run's YAML, with its status."""
    body = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "LoRAFineTune", "metadata": {"name": run.name}}
    made = api.create(run.path, {**body, "spec": SPEC, "status": finished(adapter_of("other", "theirs"))})
    assert "status" not in made
    status = run.wait_phase("Starting")
    assert status["attempt"] == 1
    assert "adapter" not in status


@controlplane
def test_a_restored_status_does_not_publish_the_adapter_of_another_namespace(
    api: Api, run: Run, settings: Settings
) -> None:
    """Attack: who may write statuses, or a backup of another namespace, puts another run's adapter into one."""
    run.create()
    put_status(api, run, finished(adapter_of("other", "theirs")))
    with OperatorThread(settings) as operator:
        run.wait("a word", lambda status: run.condition("Published").get("reason") == "ForeignAdapter")
        for kind in ("Published", "Ready"):
            assert run.condition(kind)["status"] == "False"
            assert "theirs-v1 is not the name of its version 1, run-v1" in run.condition(kind)["message"]
        assert run.condition("Complete")["status"] == "True", "it is not trained again"
        assert run.jobs() == []
        writes = [call for call in operator.calls if call.startswith("PATCH")]
        assert len(writes) == 1, "it is said once"


@controlplane
def test_a_restored_status_keeps_its_own_adapter(api: Api, run: Run, settings: Settings) -> None:
    """A backup of the run itself, under a new uid: it stays what it is, and nothing is trained again."""
    run.create()
    put_status(api, run, finished(run.adapter))
    with OperatorThread(settings):
        run.wait("a look", lambda status: status.get("observedGeneration") == 1)
        status = run.status
    assert status["adapter"] == run.adapter
    assert run.condition("Published")["status"] == "True"
    assert run.jobs() == []


@controlplane
def test_a_restored_run_that_was_training_goes_on_by_itself(api: Api, run: Run, settings: Settings) -> None:
    """Attack: a backup of a run that trained comes back with a new uid, attempts and failures, and no Jobs."""
    run.create()
    condition = {"type": "Running", "status": "True", "reason": "PodsRunning", "lastTransitionTime": now()}
    put_status(api, run, {"phase": "Running", "attempt": 3, "conditions": [condition], "chargedRestarts": 1})
    with OperatorThread(settings):
        run.gang(4)
        status = run.status
        assert [(item["attempt"], item["reason"]) for item in status["failures"]] == [(3, "JobDeleted")]
        [job] = run.jobs()
        assert job["metadata"]["ownerReferences"][0]["uid"] == run.raw["metadata"]["uid"]


@controlplane
def test_a_forged_status_deletes_nothing_of_others(api: Api, run: Run, settings: Settings) -> None:
    """Attack: who may write statuses says of a run that it has ended, so that the objects of its names are deleted."""
    owned = f"/api/v1/namespaces/{run.namespace}"
    kept = [
        api.create(f"{owned}/services", {"metadata": {"name": "run-1"}, "spec": {"ports": [{"port": 1}]}}),
        api.create(f"{owned}/services", {"metadata": {"name": "run-gang"}, "spec": {"ports": [{"port": 1}]}}),
        api.create(f"{owned}/configmaps", {"metadata": {"name": "run-2"}, "data": {"mine": "yes"}}),
        api.create(f"{owned}/configmaps", {"metadata": {"name": "run-pre1"}, "data": {"mine": "yes"}}),
    ]
    run.create(lambda spec: spec.update(runPolicy={"ttlSecondsAfterFinished": 0}))
    put_status(api, run, {**finished(run.adapter), "failedPreflights": 1})
    with OperatorThread(settings):
        run.wait("cleaned up", lambda status: run.condition("CleanedUp").get("status") == "True")
    for before, kind in zip(kept, ("services", "services", "configmaps", "configmaps"), strict=True):
        after = api.get(f"{owned}/{kind}/{before['metadata']['name']}")
        assert after["metadata"]["uid"] == before["metadata"]["uid"]


@controlplane
def test_last_words_cannot_claim_the_adapter_of_another_run(run: Run, operator: OperatorThread) -> None:
    """Attack: an image of somebody's own, or a pod in the gang's name, says that it published another run's adapter."""
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    run.set_running(1)
    run.set_ended(1, 1, 0, reason="Completed")
    run.set_ended(1, 0, 0, termination(adapter=adapter_of("other", "theirs")), "Completed")
    run.wait_phase("Succeeded")
    marks = {kind: run.condition(kind) for kind in ("Published", "Ready", "Stalled")}
    assert {kind: mark["status"] for kind, mark in marks.items()} == {
        "Published": "False", "Ready": "False", "Stalled": "True"
    }  # fmt: skip
    assert {mark["reason"] for mark in marks.values()} == {"ForeignAdapter"}
    assert "theirs-v1" in marks["Ready"]["message"]
    assert len(run.jobs()) == 1, "training again would not change whose adapter that is"
    eventually("people are told", lambda: [event["type"] for event in run.events()][-1] == "Warning")


@controlplane
@pytest.mark.parametrize("message", [f'"step":{HUGE}', f'"rank":{HUGE}', f'"microBatchSize":{HUGE}'])
def test_a_huge_number_in_last_words_holds_nothing_up(run: Run, operator: OperatorThread, message: str) -> None:
    """Attack: an image of somebody's own says in its last words a number that no status can hold."""
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    run.set_running(1)
    for index in (0, 1):
        run.set_ended(1, index, 70, f'{{"outcome":"failed","class":"Internal","at":"{now()}",{message}}}')
    assert run.wait_phase("Failed")["failures"][0]["class"] == "Internal"


@controlplane
@pytest.mark.parametrize("owned", [False, True], ids=["by labels alone", "with the owner reference of the gang"])
def test_a_pod_made_to_look_like_rank_zero_is_not_heard(api: Api, run: Run, settings: Settings, owned: bool) -> None:
    """Attack: who may create pods makes one with the labels, and the owner, of rank 0, which says that it succeeded."""
    run.create()
    with OperatorThread(settings):
        run.set_running(1)
        run.wait_phase("Running")
        [job] = run.jobs()
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "run-1", "uid": job["metadata"]["uid"]}
        labels = {
            "lorafinetune.io/name": run.name,
            "lorafinetune.io/attempt": "1",
            "batch.kubernetes.io/job-completion-index": "0",
        }
        metadata = {"name": "run-1-0-zzzzz", "labels": labels}
        forged = {"metadata": metadata | ({"ownerReferences": [{**owner, "controller": True}]} if owned else {})}
        pod = api.create(f"/api/v1/namespaces/{run.namespace}/pods", forged | {"spec": {"containers": [CONTAINER]}})
        run.set_pod(pod, ended(0, termination(adapter=run.adapter), "Completed"))
        runs_on(run)


def runs_on(run: Run) -> None:
    """The operator has looked since: what it was told of afterwards is in the status."""
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"activeDeadlineSeconds": 7200}}})
    run.wait("another look", lambda status: status.get("observedGeneration", 0) >= 2)
    assert run.status["phase"] == "Running"
    assert "adapter" not in run.status


@controlplane
def test_a_pod_by_labels_alone_does_not_hold_up_the_next_attempt(api: Api, run: Run, settings: Settings) -> None:
    """Attack: who may create pods makes one with the labels of a run, for the run to wait for its end."""
    labels = {"lorafinetune.io/name": run.name, "lorafinetune.io/attempt": "1"}
    body = {"metadata": {"name": "squatter", "labels": labels}, "spec": {"containers": [CONTAINER]}}
    api.create(f"/api/v1/namespaces/{run.namespace}/pods", body)
    run.create()
    with OperatorThread(settings):
        eventually("the first attempt", lambda: len(run.jobs()) == 1)
        assert json.dumps(run.status).count("WaitingForPodsToEnd") == 0
