"""What happens before the first attempt, on a real API server and Job controller."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import devcluster
from lora_operator.kube.client import KubeClient
from lora_operator.settings import Settings
from lora_operator.watched.cache import Resource
from tests.controlplane.lifecycle.test_interruptions import jobs_created
from tests.support.api import Api
from tests.support.operators import OperatorThread
from tests.support.runs import SETTLED, Run, ended, running, settled, termination, waiting
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane


@pytest.fixture
def settings(fast_settings: Callable[..., Settings], namespace: str) -> Settings:
    return fast_settings(namespace, preflight="on")


def set_policy(run: Run, **policy: Any) -> None:
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": policy}})


def test_what_it_settled_is_what_every_attempt_gets(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec["training"].update(microBatchSize="auto"))
    assert run.wait_phase("Preflight")["attempt"] == 0
    [job] = run.jobs()
    assert (job["metadata"]["name"], job["spec"]["completions"]) == ("run-pre1", 1)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][0] == "preflight"
    assert "nvidia.com/gpu" not in json.dumps(container["resources"])
    kinds = [call.split("/")[-1] for call in operator.calls if not call.startswith("GET ")]
    assert kinds[:3] == ["networkpolicies", "jobs", "status"]
    run.set_preflight(1, running())
    assert run.condition("PreflightPassed")["status"] == "False"
    run.set_preflight(1, ended(0, settled(), "Completed"))
    documents = {"pre1": run.document("pre1")}
    status = run.wait("attempt 1", lambda status: status.get("attempt") == 1)
    assert (status["pins"], status["plan"]["microBatchSize"]) == (SETTLED["pins"], 2)
    documents["1"] = run.document(1)
    assert run.condition("PreflightPassed")["message"] == "48 records; 18 steps"
    run.set_running(1)
    run.wait_phase("Running")
    run.set_failed(1, "Internal", 70)
    run.set_running(2)
    documents["2"] = run.document(2)
    for name in ("1", "2"):
        assert (documents[name]["pins"], documents[name]["training"]["microBatchSize"]) == (SETTLED["pins"], 2)
    assert "pins" not in documents["pre1"]
    run.set_succeeded(2)
    status = run.wait_phase("Succeeded")
    assert (status["attempt"], status["failedPreflights"], status["chargedRestarts"]) == (2, 0, 1)
    assert [job["metadata"]["name"] for job in run.jobs()] == ["run-2", "run-pre1"], "its log is kept"


def test_a_bad_record_ends_the_run_before_any_gang(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_preflight(1, ended(65, termination("BadData", "dataset.train: record 7: completion is missing")))
    status = run.wait_phase("Failed")
    assert (status["attempt"], status["reason"], status["gpuSeconds"]) == (0, "BadData", 0)
    [failure] = status["failures"]
    assert (failure["attempt"], failure["exitCode"]) == (0, 65)
    assert "record 7: completion is missing" in run.condition("Stalled")["message"]
    assert run.condition("PreflightPassed")["reason"] == "BadData"
    assert (run.pods(1), run.services()) == ([], [])
    run.delete()


def test_one_that_is_lost_is_followed_by_another(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_preflight(1, ended(70, termination("Internal", "503 Slow Down")))
    run.set_preflight(2, {**ended(137), "conditions": [
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}
    ]})  # fmt: skip
    run.set_preflight(3, ended(0, settled(), "Completed"))
    status = run.wait("attempt 1", lambda status: status.get("attempt") == 1)
    assert [failure["class"] for failure in status["failures"]] == ["Internal", "Evicted"]
    assert (status["failedPreflights"], status["chargedRestarts"]) == (2, 1)
    reasons = ["Preflight", "Internal", "Evicted", "PreflightPassed", "Started"]
    eventually("Events", lambda: [event["reason"] for event in run.events()] == reasons)


def test_its_image_is_missing(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_preflight(1, waiting("ImagePullBackOff", "no such image"))
    run.wait("why", lambda status: status.get("reason") == "ImagePullFailed")
    assert run.condition("PreflightPassed")["reason"] == "ImagePullFailed"
    status = run.wait_phase("Failed")
    assert status["failures"][0]["class"] == "ImagePullFailed"
    eventually("no pod is left", lambda: not run.preflight_pods(1))


def test_suspend_and_resume(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_preflight(1, running())
    set_policy(run, suspend=True)
    run.wait("suspended", lambda status: status.get("reason") == "Suspended")
    assert (run.jobs(), run.preflight_pods(1)) == ([], [])
    set_policy(run, suspend=False)
    run.set_preflight(1, ended(0, settled(), "Completed"))
    status = run.wait("attempt 1", lambda status: status.get("attempt") == 1)
    assert (status["failedPreflights"], status.get("failures", [])) == (0, [])


def test_a_deleted_job_is_made_again(run: Run, operator: OperatorThread) -> None:
    run.create()
    run.set_preflight(1, running())
    first = run.jobs()[0]
    path = f"/apis/batch/v1/namespaces/{run.namespace}/jobs/run-pre1"
    run.api.delete(path, propagationPolicy="Background")
    eventually("another one", lambda: {job["metadata"]["uid"] for job in run.jobs()} - {first["metadata"]["uid"]})
    [second] = run.jobs()

    def look() -> bool:
        owners = [pod["metadata"]["ownerReferences"][0]["uid"] for pod in run.preflight_pods(1)]
        assert owners == [second["metadata"]["uid"]]
        return True

    eventually("its pod alone", look)
    run.set_preflight(1, ended(0, settled(), "Completed"))
    assert run.wait("attempt 1", lambda status: status.get("attempt") == 1)["failedPreflights"] == 0


def test_an_operator_that_sees_the_run_late_makes_no_preflight_again(
    cp: devcluster.ControlPlane, run: Run, settings: Settings, namespace: str
) -> None:
    """It sees that the Job is gone, and not yet that another operator has put the failure on record."""
    with OperatorThread(settings):
        run.create()
        run.set_preflight(1, running())
        run.wait("a condition", lambda _: run.condition("PreflightPassed"))
        late = run.raw
        run.set_preflight(1, ended(70, termination("Internal", "503 Slow Down")))
        eventually("the next", lambda: [job["metadata"]["name"] for job in run.jobs()] == ["run-pre2"])

    missed = list[str]()

    def see_it_late(client: KubeClient) -> None:
        whole = client.fetch_list

        async def fetch_list(resource: str, *args: Any) -> Any:
            async for item in whole(resource, *args):
                if resource == Resource.RUNS:
                    missed.extend(failure["class"] for failure in item["status"]["failures"])
                    yield late
                else:
                    yield item

        client.fetch_list = fetch_list  # type: ignore[method-assign]

    with OperatorThread(settings, wrap=see_it_late):
        run.set_preflight(2, ended(0, settled(), "Completed"))
        run.wait("attempt 1", lambda status: status.get("attempt") == 1)
    assert missed == ["Internal"], "it did not see the failure that is on record"
    assert jobs_created(cp, namespace) == ["run-1", "run-pre1", "run-pre2"]


def test_a_stranger_has_its_name(api: Api, run: Run, operator: OperatorThread) -> None:
    path = f"/apis/batch/v1/namespaces/{run.namespace}/jobs"
    pod = {"restartPolicy": "Never", "containers": [{"name": "any", "image": "any"}]}
    before = api.create(path, {"metadata": {"name": "run-pre1"}, "spec": {"suspend": True, "template": {"spec": pod}}})
    run.create()
    status = run.wait_phase("Failed")
    assert (status["reason"], status["failures"][0]["attempt"]) == ("NameConflict", 0)
    assert api.get(f"{path}/run-pre1")["metadata"]["uid"] == before["metadata"]["uid"]


def test_it_is_cleared_up_with_the_run(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(runPolicy={"ttlSecondsAfterFinished": 1}))
    run.set_preflight(1, ended(70, termination("Internal", "503 Slow Down")))
    run.set_preflight(2, ended(65, termination("BadData", "record 7")))
    run.wait_phase("Failed")
    eventually("nothing is left", lambda: (run.jobs(), run.policies(), run.preflight_pods(2)) == ([], [], []))


def test_an_operator_cut_after_any_call_is_continued_by_the_next(
    cp: devcluster.ControlPlane, api: Api, make_namespace: Callable[[], str], fast_settings: Callable[..., Settings]
) -> None:
    """The first preflight is lost, the second passes: for every k, cut after the k-th call, the same end."""
    lost, passed = ended(70, termination("Internal", "503 Slow Down")), ended(0, settled(), "Completed")

    def play(run: Run, is_over: Callable[[], bool]) -> None:
        """Plays the node for what pods there are, until the first attempt is there or ``is_over``."""

        def look() -> bool:
            for number, status in ((1, lost), (2, passed)):
                for pod in run.preflight_pods(number):
                    if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]:
                        run.set_pod(pod, status)
            return is_over() or run.status.get("attempt") == 1

        eventually("the end of the preflight", look)

    def pass_with_cut(k: int | None) -> int:
        namespace = make_namespace()
        settings = fast_settings(namespace, preflight="on", log_interval=60.0, progress_interval=60.0)
        run = Run(api, namespace).create()
        first = OperatorThread(settings, cut_after=k).start()
        try:
            play(run, lambda: first.is_cut)
            if k is None:
                eventually("the last Event", lambda: [event["reason"] for event in run.events()][-1:] == ["Started"])
        finally:
            first.stop()
        with OperatorThread(settings):
            play(run, lambda: False)
            run.gang(1)
        status = run.status
        assert (status["failedPreflights"], status["chargedRestarts"], status["attempt"]) == (1, 1, 1), f"k={k}"
        assert status["pins"] == SETTLED["pins"]
        assert jobs_created(cp, namespace) == ["run-1", "run-pre1", "run-pre2"], f"k={k}"
        return len(first.calls)

    calls = pass_with_cut(None)
    assert 12 <= calls <= 30, calls
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pass_with_cut, range(1, calls + 1)))
