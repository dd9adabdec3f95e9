"""Whole lifecycles on a real API server and Job controller."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lora_api import FAILURE_RULES, RULES, FailureClass, FailureRule
from lora_operator.settings import Settings
from tests.support.api import Api, ApiError
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, now, running, termination, unschedulable, waiting
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

EXITS = [rule for rule in FAILURE_RULES if rule.exit_code is not None]


def own_calls(operator: OperatorThread) -> list[str]:
    """Calls of one life: without the LISTs at start, Events and logs."""
    return [call for call in operator.calls if "/log" not in call and "/events" not in call and call[:4] != "GET "]


def test_a_run_that_goes_well(run: Run, operator: OperatorThread) -> None:
    run.create()
    assert run.wait_phase("Starting")["attempt"] == 1
    assert len(own_calls(operator)) == 4, "NetworkPolicy, Service, Job, status"
    run.set_running(1)
    run.wait_phase("Running")
    assert run.condition("Scheduled")["status"] == "True"
    run.set_succeeded(1)
    status = run.wait_phase("Succeeded")
    assert status["adapter"] == run.adapter
    values = {item["type"]: item["status"] for item in status["conditions"]}
    assert values == {
        "Ready": "True",
        "Reconciling": "False",
        "Stalled": "False",
        "Scheduled": "True",
        "Running": "False",
        "Published": "True",
        "Complete": "True",
    }
    reasons = ["Started", "Running", "Succeeded"]
    eventually("three Events", lambda: [event["reason"] for event in run.events()] == reasons)
    assert len(own_calls(operator)) <= 7, own_calls(operator)


def test_a_run_of_one_node_is_launched_with_three_calls(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(parallelism={"nodes": 1, "gpusPerNode": 0}))
    run.wait_phase("Starting")
    kinds = [call.split("/")[-1] for call in own_calls(operator)]
    assert kinds == ["networkpolicies", "jobs", "status"], "there is nobody to find: no Service"
    [pod] = run.gang(1, size=1)
    assert "subdomain" not in pod["spec"]
    assert {"name": "MASTER_ADDR", "value": "localhost"} in pod["spec"]["containers"][0]["env"]


def test_whatever_characters_a_pod_says_reach_the_status_but_for_those_that_nobody_sees(
    run: Run, operator: OperatorThread
) -> None:
    """gloo's errors end with a picture of a beach. A control character may do anything to a terminal."""
    words = "Connection reset by peer. GLHF! \U0001f3d6\ufe0f \x7f \x9b31m \ufeff \u4e2d \\ud83c"
    run.create()
    run.set_running(1)
    run.set_failed(1, "Internal", 70, words)
    assert run.wait("attempt 2", lambda status: status["attempt"] == 2)["failures"][0]["message"] == (
        "Connection reset by peer. GLHF! \U0001f3d6\ufe0f  31m \ufeff \u4e2d \\ud83c"
    )
    eventually("the Event", lambda: any("\U0001f3d6" in event["note"] for event in run.events()))


def test_the_children_belong_to_the_run_and_are_as_the_builders_made_them(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.gang(1)
    uid = run.raw["metadata"]["uid"]
    for child, name in ((run.jobs()[0], "run-1"), (run.services()[0], "run-gang")):
        assert child["metadata"]["name"] == name
        assert [owner["uid"] for owner in child["metadata"]["ownerReferences"]] == [uid]
        assert "lora-operator" in {fields["manager"] for fields in child["metadata"]["managedFields"]}
    document = run.document(1)
    assert (document["uid"], document["attempt"], document["training"]["maxSteps"]) == (uid, 1, 18)
    (service,) = run.services()
    assert (service["spec"]["clusterIP"], service["spec"]["selector"]) == ("None", {"lorafinetune.io/uid": uid})
    for pod in run.gang(1):
        assert pod["metadata"]["labels"]["lorafinetune.io/uid"] == uid
        assert pod["spec"]["subdomain"] == "run-gang"
        assert json.loads(pod["metadata"]["annotations"]["lorafinetune.io/run"]) == document
        (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "run"]
        (item,) = volume["downwardAPI"]["items"]
        assert item["path"] == "run.json"
        assert item["fieldRef"]["fieldPath"] == "metadata.annotations['lorafinetune.io/run']"
    assert run.configmaps() == []
    job = run.jobs()[0]["spec"]
    assert (job["completions"], job["backoffLimitPerIndex"], job["podReplacementPolicy"]) == (2, 0, "Failed")


@pytest.mark.parametrize("rule", EXITS, ids=lambda rule: str(rule.failure_class))
def test_a_failed_rank_is_named_with_its_remedy(
    api: Api, namespace: str, operator: OperatorThread, rule: FailureRule
) -> None:
    run = Run(api, namespace).create()
    run.set_running(1)
    run.wait_phase("Running")
    run.set_failed(1, str(rule.failure_class), rule.exit_code or 0, "record 7 is broken")
    if rule.retried:
        status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
        assert status["chargedRestarts"] == int(rule.charged)
        run.gang(2)
        assert [job["metadata"]["name"] for job in run.jobs()] == ["run-2"]
        assert run.pods(1) == []
    else:
        status = run.wait_phase("Failed")
        message = f"record 7 is broken. Remedy: {rule.remedy}"
        for kind, value in {"Ready": "False", "Stalled": "True", "Failed": "True"}.items():
            condition = run.condition(kind)
            assert (condition["status"], condition["reason"]) == (value, str(rule.failure_class))
            assert condition["message"] == (message if kind == "Stalled" else condition["message"])
            assert kind == "Stalled" or "the condition Stalled says why" in condition["message"]
        assert len(run.pods(1)) == 2, "the pods are kept for their logs"
    failure = status["failures"][0]
    if rule.failure_class is FailureClass.PEER_LOST:  # both ranks only lost each other
        return
    assert (failure["class"], failure["attempt"]) == (str(rule.failure_class), 1)
    if rule.failure_class is FailureClass.CHECKPOINTED:  # one rank says so, the other lost it
        return
    assert failure["message"] == "record 7 is broken"
    assert (failure["rank"], failure["exitCode"], failure["remedy"]) == (1, rule.exit_code, rule.remedy)
    assert failure["pod"].startswith("run-1-1-")


def test_restarts_end_with_max_restarts(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 1}))
    for attempt in (1, 2):
        run.set_running(attempt)
        run.wait_phase("Running")
        run.set_failed(attempt, "Internal", 70, "it broke")
    status = run.wait_phase("Failed")
    assert (status["attempt"], status["chargedRestarts"], len(status["failures"])) == (2, 1, 2)
    message = run.condition("Stalled")["message"]
    assert message.startswith("it broke (after 1 of runPolicy.maxRestarts = 1 restarts). Remedy: ")
    reasons = ["Started", "Running", "Internal"] * 2
    eventually("six Events", lambda: [event["reason"] for event in run.events()] == reasons)


def test_a_pod_without_a_limit_that_the_kernel_ends_is_not_charged(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    run.set_running(1)
    run.wait_phase("Running")
    run.set_ended(1, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))
    run.set_ended(1, 1, 137, reason="OOMKilled")
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    failure = status["failures"][0]
    assert (failure["class"], failure["reason"]) == ("Evicted", "NodeOutOfMemory")


def test_memory_limit_passed_ends_the_run_and_its_hanging_peer(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(podTemplate={"resources": {"limits": {"memory": "1Gi"}}}))
    run.set_running(1)
    run.wait_phase("Running")
    run.set_ended(1, 1, 137, reason="OOMKilled")
    run.wait("a word at once", lambda status: status["reason"] == "PodFailed")
    status = run.wait_phase("Failed")
    assert status["reason"] == "HostOutOfMemory"
    assert status["failures"][0]["rank"] == 1
    assert RULES[FailureClass.HOST_OUT_OF_MEMORY].remedy in run.condition("Stalled")["message"]
    eventually("only the failed pod is kept", lambda: [pod["status"]["phase"] for pod in run.pods(1)] == ["Failed"])


def test_a_deleted_pod_restarts_the_gang(
    run: Run, fast_settings: Callable[..., Settings], namespace: str, api: Api
) -> None:
    with OperatorThread(fast_settings(namespace, failure_grace=60.0, node_grace=60.0)):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        deleted, peer = run.pods(1)
        api.delete(f"/api/v1/namespaces/{run.namespace}/pods/{deleted['metadata']['name']}")
        run.set_pod(peer, ended(73, termination("PeerLost", "Connection closed by peer", rank=1)))
        status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
        assert (status["failures"][0]["class"], status.get("chargedRestarts", 0)) == ("PodLost", 0)
        run.gang(2)


def test_a_deleted_job_restarts_the_gang(run: Run, operator: OperatorThread, api: Api) -> None:
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    api.delete(f"/apis/batch/v1/namespaces/{run.namespace}/jobs/run-1", propagationPolicy="Background")
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert (status["failures"][0]["class"], status["failures"][0]["reason"]) == ("PodLost", "JobDeleted")


@pytest.mark.parametrize(
    ("code", "last_words", "said"),
    [
        (75, termination("Checkpointed", "saved step 9"), ""),
        (70, termination("Internal", "the thread of the checkpoint died"), "It said: Internal: the thread of"),
    ],
)
def test_an_evicted_pod_is_not_charged(
    run: Run, operator: OperatorThread, code: int, last_words: str, said: str
) -> None:
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    run.set_running(1)
    run.wait_phase("Running")
    target = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "default-scheduler: preempting to accommodate a higher priority pod",
        "lastTransitionTime": now(),
    }
    pods = run.gang(1)
    run.set_pod(pods[0], ended(73, termination("PeerLost", "Connection closed by peer", rank=0)))
    run.set_pod(pods[1], {**ended(code, last_words), "conditions": [target]})
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert said in status["failures"][0]["message"]
    failure = status["failures"][0]
    assert (failure["class"], failure["reason"]) == ("Evicted", "PreemptionByScheduler")
    assert "preempting to accommodate" in failure["message"]


@pytest.mark.parametrize("message", ["", "not ours", termination()[:-40]])
def test_success_without_a_word_is_none(run: Run, operator: OperatorThread, message: str) -> None:
    run.create(lambda spec: spec.update(runPolicy={"maxRestarts": 0}))
    run.set_running(1)
    run.set_ended(1, 1, 0)
    run.set_ended(1, 0, 0, message)
    assert run.wait_phase("Failed")["failures"][0]["class"] == "Internal"


@pytest.mark.parametrize(
    ("reason", "detail", "failure_class"),
    [
        ("ErrImagePull", "trainer:nope: not found", "ImagePullFailed"),
        ("InvalidImageName", "couldn't parse image name", "ImagePullFailed"),
        ("CreateContainerConfigError", 'secret "lora-store" not found', "PodNotStarted"),
    ],
)
def test_what_keeps_a_pod_from_starting_is_shown_and_then_ends_the_run(
    run: Run, operator: OperatorThread, reason: str, detail: str, failure_class: str
) -> None:
    run.create()
    run.set_pod(run.gang(1)[0], waiting(reason, detail))
    run.wait("a condition", lambda status: run.condition("Running").get("reason") == failure_class)
    condition = run.condition("Running")
    assert (condition["status"], run.condition("Stalled")["status"]) == ("False", "False")
    rule = RULES[FailureClass(failure_class)]
    assert f"{reason}: {detail}. Remedy: {rule.waiting_remedy}" in condition["message"]
    status = run.wait_phase("Failed")
    assert status["failures"][0]["remedy"] == rule.remedy
    assert status["failures"][0]["class"] == failure_class
    assert detail in run.condition("Stalled")["message"]
    eventually("pods that never ran are taken away", lambda: run.pods(1) == [])


def test_a_registry_that_is_away_ends_no_run_that_has_worked(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, start_timeout=1.0)):
        run.create()
        run.set_running(1)
        run.wait_phase("Running")
        saved = termination("Checkpointed", "asked to stop", rank=0, step=12, checkpointStep=12)
        for index in (1, 0):
            run.set_ended(1, index, 75, saved)
        run.wait("attempt 2", lambda status: status.get("attempt") == 2)
        run.set_pod(run.gang(2)[0], waiting("ImagePullBackOff", "503 Service Unavailable"))
        status = run.wait("attempt 3", lambda status: status.get("attempt") == 3)
        assert (status["failures"][-1]["class"], status.get("chargedRestarts", 0)) == ("ImagePullFailed", 0)
        assert "pulled again by itself" in status["failures"][-1]["remedy"]
        run.set_running(3)
        run.wait_phase("Running")


def test_an_image_that_comes_late_is_no_failure(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, start_timeout=60.0)):
        run.create()
        run.set_pod(run.gang(1)[0], waiting("ImagePullBackOff", "Back-off pulling image"))
        run.wait("a condition", lambda status: run.condition("Running").get("reason") == "ImagePullFailed")
        run.set_running(1)
        run.wait_phase("Running")
        assert run.condition("Running")["reason"] == "PodsRunning"


def test_a_gang_that_fits_nowhere_says_so_and_waits(run: Run, operator: OperatorThread) -> None:
    run.create()
    words = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    for pod in run.gang(1):
        run.set_pod(pod, unschedulable(words))
    run.wait("a condition", lambda status: run.condition("Scheduled").get("reason") == "Unschedulable")
    assert words in run.condition("Scheduled")["message"]
    assert "Remedy: " in run.condition("Scheduled")["message"]
    run.set_running(1)
    run.wait_phase("Running")


def test_a_quota_that_is_full_is_shown(run: Run, operator: OperatorThread, api: Api) -> None:
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "0"}}}
    api.create(f"/api/v1/namespaces/{run.namespace}/resourcequotas", quota)
    run.create()
    run.wait("a condition", lambda status: run.condition("Scheduled").get("reason") == "QuotaExceeded")
    assert "are refused: Error creating: exceeded quota: few" in run.condition("Scheduled")["message"]
    assert run.status["phase"] == "Starting"


def test_pods_that_admission_refuses_end_the_run(run: Run, operator: OperatorThread, api: Api) -> None:
    limit = {"type": "Container", "max": {"memory": "1Gi"}}
    api.create(
        f"/api/v1/namespaces/{run.namespace}/limitranges", {"metadata": {"name": "small"}, "spec": {"limits": [limit]}}
    )
    resources = {"requests": {"memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    run.create(lambda spec: spec.update(podTemplate={"resources": resources}))
    status = run.wait_phase("Failed")
    assert status["failures"][0]["class"] == "PodNotStarted"
    assert "maximum memory usage per Container is 1Gi" in run.condition("Stalled")["message"]


@pytest.mark.parametrize(("kind", "name"), [("services", "run-gang"), ("jobs", "run-1")])
def test_a_foreign_object_with_a_childs_name_is_left_alone(
    api: Api, run: Run, operator: OperatorThread, kind: str, name: str
) -> None:
    foreign: dict[str, Any] = {
        "services": {"spec": {"clusterIP": "None", "ports": [{"port": 80}]}},
        "jobs": {"spec": {"suspend": True, "template": _any_pod()}},
    }[kind]
    group = "/apis/batch/v1" if kind == "jobs" else "/api/v1"
    path = f"{group}/namespaces/{run.namespace}/{kind}"
    before = api.create(path, {"metadata": {"name": name}, **foreign})
    run.create()
    status = run.wait_phase("Failed")
    assert status["failures"][0]["class"] == "NameConflict"
    assert f"{name} exists already and belongs to no LoRAFineTune" in run.condition("Stalled")["message"]
    after = api.get(f"{path}/{name}")
    assert (after["metadata"]["uid"], after["metadata"].get("ownerReferences")) == (before["metadata"]["uid"], None)
    assert after["spec"] == before["spec"]


def _any_pod() -> dict[str, Any]:
    return {"spec": {"restartPolicy": "Never", "containers": [{"name": "any", "image": "any"}]}}


def test_deleting_the_run_takes_everything_along(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    run.delete()
    for look in (run.jobs, run.services, run.policies):
        eventually(f"no {look.__name__}", lambda look=look: look() == [])
    eventually("no pods", lambda: run.pods(1) == [])
    with pytest.raises(ApiError):
        _ = run.raw


def test_a_run_created_again_under_its_name_starts_anew(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    old = run.jobs()[0]["metadata"]["uid"]
    run.delete()
    run.create()
    status = run.wait_phase("Starting", seconds=60)
    assert (status["attempt"], status.get("failures", [])) == (1, [])
    assert run.jobs()[0]["metadata"]["uid"] != old
    run.gang(1)


def test_progress_comes_from_the_log_of_rank_0(run: Run, operator: OperatorThread) -> None:
    def line(step: int, second: int) -> str:
        at = f"2026-11-23T10:00:{second:02}Z"
        words = {
            "event": "step",
            "at": at,
            "step": step,
            "totalSteps": 18,
            "loss": 3.0 / step,
            "tokensPerSecond": 100.0,
        }
        return json.dumps({"lora": words}) + "\n"

    operator.logs["run-1-0-"] = "noise\n" + line(1, 0) + line(2, 3)
    run.create()
    run.set_running(1)
    progress = run.wait("progress", lambda status: status.get("progress"))["progress"]
    assert (progress["step"], progress["summary"], progress["eta"]) == (2, "11%", "48s")
    operator.logs["run-1-0-"] += line(9, 24)
    progress = run.wait("more progress", lambda status: status["progress"]["step"] == 9)["progress"]
    assert progress["history"] == [[1, 3.0], [2, 1.5], [9, 0.33333]]
    operator.logs["run-1-0-"] += json.dumps({"lora": {"event": "stage", "stage": "publishing", "at": now()}})
    run.wait_phase("Publishing")
    run.set_succeeded(1)
    assert run.wait_phase("Succeeded")["progress"]["summary"] == "100%"


def test_the_last_lines_of_the_failed_pod_are_kept(run: Run, operator: OperatorThread) -> None:
    operator.logs["run-1-1-"] = "Traceback\nValueError: broken\n"
    run.create()
    run.set_running(1)
    run.set_failed(1, "BadData", 65)
    assert run.wait_phase("Failed")["failures"][0]["logTail"].endswith("ValueError: broken\n")


def test_a_silent_pod_is_suspected_when_its_peer_gives_up(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    run.set_ended(1, 0, 73, termination("PeerLost", "Timed out waiting 1800000ms for send operation", rank=0))
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    failure = status["failures"][0]
    assert (failure["class"], failure["reason"]) == ("PeerLost", "PeerSilent")
    assert failure["pod"].startswith("run-1-1-")
    assert status["chargedRestarts"] == 1


def test_a_node_that_does_not_answer_costs_the_run_nothing(run: Run, operator: OperatorThread) -> None:
    """What the node controller writes when it has not heard from a kubelet (MarkPodsNotReady)."""
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    run.set_ended(1, 0, 73, termination("PeerLost", "Connection closed by peer", rank=0))
    run.wait("the peer has failed", lambda status: status.get("reason") == "PodFailed")
    [pod] = [pod for pod in run.pods(1) if pod["metadata"]["name"].startswith("run-1-1-")]
    unready = {"type": "Ready", "status": "False"}
    run.set_pod(pod, {"conditions": [{"type": "PodScheduled", "status": "True"}, unready]})
    status = run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert [failure["class"] for failure in status["failures"]] == ["NodeLost"]
    assert status["chargedRestarts"] == 0


__all__ = ["running"]
