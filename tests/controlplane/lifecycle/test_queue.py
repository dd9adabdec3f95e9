"""Runs that wait in a queue, on a real API server and Job controller. The test plays Kueue: it writes spec.suspend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lora_operator.settings import Settings
from tests.support.api import Api, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, now, settled, termination
from tests.support.versions import MUTATIONS, needs
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

TRACKING = "batch.kubernetes.io/job-tracking"
"""Finalizer of pods whose end the Job controller will count."""


class Queue:
    """What Kueue does to the Jobs of a run: those of attempts 1, 2, ... and of preflights "pre1", "pre2", ..."""

    def __init__(self, run: Run) -> None:
        self.run = run
        # One of its own: 40 s after a node is first missed Kubernetes takes away whatever is on a node of that name.
        self.node = f"no-such-node-{run.namespace}"

    def job(self, attempt: int | str) -> Raw:
        name = f"{self.run.name}-{attempt}"
        return next(job for job in self.run.jobs() if job["metadata"]["name"] == name)

    def wait_job(self, attempt: int | str) -> Raw:
        def names() -> list[str]:
            return [job["metadata"]["name"] for job in self.run.jobs()]

        self.run.wait(f"the Job of attempt {attempt}", lambda _: f"{self.run.name}-{attempt}" in names())
        return self.job(attempt)

    def suspend(self, attempt: int | str, *, suspend: bool) -> None:
        path = f"/apis/batch/v1/namespaces/{self.run.namespace}/jobs/{self.run.name}-{attempt}"
        self.run.api.patch(path, {"spec": {"suspend": suspend}})

    def admit(self, attempt: int) -> None:
        """Lets the Job go, and brings its pods to a node: a pod without one is deleted at once."""
        self.suspend(attempt, suspend=False)
        for pod in self.run.gang(attempt):
            metadata = pod["metadata"]
            path = f"/api/v1/namespaces/{self.run.namespace}/pods/{metadata['name']}/binding"
            target = {"apiVersion": "v1", "kind": "Node", "name": self.node}
            self.run.api.create(path, {"metadata": {"name": metadata["name"]}, "target": target})
        self.run.set_running(attempt)

    def take_back(self, attempt: int) -> None:
        """Suspends the Job, and waits until the Job controller has asked all its pods to stop and let go of them."""
        self.suspend(attempt, suspend=True)
        eventually("the pods are asked to stop", lambda: are_stopping(self.run, attempt))

    def end_pods(self, attempt: int) -> None:
        """What the kubelet does to its pods that were asked to stop: they checkpoint, end, and are gone.

        A pod that the Job controller has made twice has no node, and goes by itself.
        """
        stopping = [
            pod
            for pod in self.run.pods(attempt)
            if "deletionTimestamp" in pod["metadata"] and "nodeName" in pod["spec"]
        ]
        for pod in stopping:
            self.run.set_pod(pod, ended(75, termination("Checkpointed", "asked to stop", step=7)))
        for pod in stopping:
            path = f"/api/v1/namespaces/{self.run.namespace}/pods/{pod['metadata']['name']}"
            self.run.api.delete(path, gracePeriodSeconds=0)


@pytest.fixture
def queue(run: Run) -> Queue:
    return Queue(run)


def create(run: Run, **policy: Any) -> None:
    run.create(lambda spec: spec.update(runPolicy={"queueName": "team-a", **policy}))


def are_stopping(run: Run, attempt: int) -> bool:
    pods = run.pods(attempt)
    alive = [pod for pod in pods if pod["status"].get("phase") == "Running"]
    let_go = [pod["metadata"] for pod in alive if TRACKING not in pod["metadata"].get("finalizers", [])]
    return bool(pods) and len(let_go) == len(alive) and all("deletionTimestamp" in metadata for metadata in let_go)


def test_a_run_waits_until_its_job_is_let_go(run: Run, queue: Queue, operator: OperatorThread) -> None:
    create(run)
    status = run.wait_phase("Queued")
    job = queue.wait_job(1)
    assert (job["spec"]["suspend"], job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]) == (True, "team-a")
    assert (status["attempt"], run.pods(1)) == (1, [])
    for kind in ("Scheduled", "Running"):
        assert (run.condition(kind)["status"], run.condition(kind)["reason"]) == ("False", "Queued")
    status = run.wait("no Kueue", lambda _: "this cluster has no Kueue" in run.condition("Running")["message"])
    assert "Remedy: Install Kueue" in run.condition("Scheduled")["message"]
    asked = sum("kueue" in call for call in operator.calls)

    queue.admit(1)
    run.wait_phase("Running")
    run.set_succeeded(1)
    run.wait_phase("Succeeded")
    reasons = ["Started", "Queued", "Running", "Succeeded"]
    eventually("Events", lambda: [event["reason"] for event in run.events()] == reasons)
    assert sum("kueue" in call for call in operator.calls) <= asked + 2, "nobody asks about a gang that runs"


def test_a_gang_whose_quota_is_taken_back_is_queued_again(run: Run, queue: Queue, operator: OperatorThread) -> None:
    create(run, maxRestarts=0)
    queue.wait_job(1)
    queue.admit(1)
    run.wait_phase("Running")
    queue.take_back(1)
    status = run.wait("a word", lambda status: status.get("reason") == "JobSuspended")
    assert (status["phase"], status["attempt"]) == ("Queued", 1)
    assert "save a checkpoint" in run.condition("Running")["message"]
    queue.end_pods(1)
    run.wait("it waits", lambda status: status.get("reason") == "Queued")

    queue.admit(1)
    run.wait_phase("Running")
    run.set_succeeded(1)
    status = run.wait_phase("Succeeded")
    assert (status["attempt"], status["preemptions"], status.get("failures", [])) == (1, 1, [])
    reasons = ["Started", "Queued", "Running", "Preempted", "Running", "Succeeded"]
    eventually("Events", lambda: [event["reason"] for event in run.events()] == reasons)


def test_the_user_suspends_a_run_that_waits(run: Run, queue: Queue, operator: OperatorThread) -> None:
    create(run)
    queue.wait_job(1)
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": True}}})
    run.wait("suspended", lambda status: status.get("reason") == "Suspended")
    assert run.jobs() == []
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": False}}})
    assert queue.wait_job(2)["spec"]["suspend"] is True
    assert run.wait_phase("Queued").get("failures", []) == []


def test_quota_that_is_taken_back_outlives_the_operator_cut_after_any_call(
    api: Api, make_namespace: Callable[[], str], fast_settings: Callable[..., Settings]
) -> None:
    def take_back_with_cut(k: int | None) -> int:
        namespace = make_namespace()
        run, settings = Run(api, namespace), fast_settings(namespace, log_interval=60.0, progress_interval=60.0)
        queue = Queue(run)
        with OperatorThread(settings):
            create(run)
            queue.wait_job(1)
            queue.admit(1)
            run.wait_phase("Running")
        queue.take_back(1)
        first = OperatorThread(settings, cut_after=k).start()
        try:
            run.wait("the cut or a word", lambda status: first.is_cut or status.get("reason") == "JobSuspended", 60)
            queue.end_pods(1)
            queue.admit(1)
            run.wait("the cut or the end", lambda status: first.is_cut or status["phase"] == "Running", 60)
        finally:
            first.stop()
        with OperatorThread(settings):
            run.wait_phase("Running", 60)
            run.set_succeeded(1)
            status = run.wait_phase("Succeeded", 60)
            assert (status["attempt"], status.get("failures", [])) == (1, [])
        return len(first.calls)

    calls = take_back_with_cut(None)
    assert 5 <= calls <= 20, calls
    for k in range(1, calls + 1):
        take_back_with_cut(k)


def test_quota_that_goes_and_comes_back_while_no_operator_is_there(
    run: Run, queue: Queue, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace)):
        create(run, maxRestarts=0)
        queue.wait_job(1)
        queue.admit(1)
        run.wait_phase("Running")
    queue.take_back(1)
    queue.end_pods(1)
    queue.admit(1)
    with OperatorThread(fast_settings(namespace)):
        run.set_succeeded(1)
        status = run.wait_phase("Succeeded")
    assert (status["attempt"], status.get("failures", [])) == (1, [])


def test_a_rank_that_ends_before_its_pod_is_taken_back_ends_the_attempt(
    run: Run, queue: Queue, operator: OperatorThread
) -> None:
    create(run, maxRestarts=0)
    queue.wait_job(1)
    queue.admit(1)
    run.wait_phase("Running")
    run.set_ended(1, 1, 75, termination("Checkpointed", "asked to stop", step=7))
    queue.take_back(1)
    queue.end_pods(1)
    status = run.wait("attempt 2", lambda status: status["attempt"] == 2)
    assert (status["phase"], status["chargedRestarts"], len(status["failures"])) == ("Queued", 0, 1)
    assert queue.wait_job(2)["spec"]["suspend"] is True
    queue.admit(2)
    run.wait_phase("Running")


QUEUE_LABELS = ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class")


@pytest.mark.parametrize("policy", [{}, {"queueName": "team-a", "workloadPriorityClassName": "research"}])
def test_a_preflight_that_is_held_back_says_so_and_waits_in_the_queue_of_its_run(
    run: Run, queue: Queue, fast_settings: Callable[..., Settings], namespace: str, policy: dict[str, str]
) -> None:
    """Kueue with manageJobsWithoutQueueName holds back every Job, and lets none go that names no queue."""

    def named() -> list[str]:
        labels = queue.job("pre1")["metadata"]["labels"]
        return [labels[label] for label in QUEUE_LABELS if label in labels]

    with OperatorThread(fast_settings(namespace, preflight="on")) as operator:
        run.create(lambda spec: spec.update(runPolicy=policy))
        assert queue.wait_job("pre1")["spec"]["suspend"] is False
        assert named() == [], "one that nobody holds back needs no quota"
        eventually("its pod is there", lambda: run.preflight_pods(1))
        queue.suspend("pre1", suspend=True)
        status = run.wait("it waits", lambda status: status.get("reason") == "Queued")
        assert (status["phase"], run.condition("PreflightPassed")["reason"]) == ("Preflight", "Queued")
        eventually("its pod is gone", lambda: not run.preflight_pods(1))
        eventually("it is in the queue of its run", lambda: named() == list(policy.values()))
        queue.suspend("pre1", suspend=False)
        run.set_preflight(1, ended(0, settled(), "Completed"))
        assert queue.wait_job(1)["spec"]["suspend"] is bool(policy)
        assert run.wait_phase("Queued" if policy else "Starting").get("failures", []) == []
    patches = [call for call in operator.calls if call.startswith("PATCH") and call.endswith("/jobs/run-pre1")]
    assert len(patches) == (1 if policy else 0)


ADMISSION = "/apis/admissionregistration.k8s.io/v1"


@contextmanager
def managed_by(api: Api, namespace: str, manager: str) -> Iterator[None]:
    """Every Job that is made in ``namespace`` is given to ``manager``, as MultiKueue does it at admission."""
    name = f"managed-by-{namespace}"
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    mutation = f'Object{{spec: Object.spec{{managedBy: "{manager}"}}}}'
    policy = {
        "matchConstraints": {"resourceRules": [rule]},
        "reinvocationPolicy": "Never",
        "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": mutation}}],
    }
    selector = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    binding = {"policyName": name, "matchResources": {"namespaceSelector": selector}}
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}
    probe = {"metadata": {"name": "probe"}, "spec": {"template": {"spec": pod}}}
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs?dryRun=All"
    api.create(f"{ADMISSION}/mutatingadmissionpolicies", {"metadata": {"name": name}, "spec": policy})
    api.create(f"{ADMISSION}/mutatingadmissionpolicybindings", {"metadata": {"name": name}, "spec": binding})
    try:
        eventually("the policy works", lambda: api.create(path, probe)["spec"].get("managedBy") == manager)
        yield
    finally:
        api.delete(f"{ADMISSION}/mutatingadmissionpolicybindings/{name}")
        api.delete(f"{ADMISSION}/mutatingadmissionpolicies/{name}")


@needs(MUTATIONS)
def test_a_job_that_another_controller_manages_is_left_to_it(
    run: Run, queue: Queue, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    manager = "kueue.x-k8s.io/multikueue"
    with managed_by(run.api, namespace, manager), OperatorThread(fast_settings(namespace)) as operator:
        create(run)
        made = queue.wait_job(1)
        assert made["spec"]["managedBy"] == manager
        run.wait("it was asked", lambda _: "no Kueue" in run.condition("Running").get("message", ""))
        queue.suspend(1, suspend=False)
        run.wait_phase("Starting")
        path = f"/apis/batch/v1/namespaces/{namespace}/jobs/run-1/status"
        run.api.patch(path, {"status": {"startTime": now(), "active": 2}})
        eventually("it looks for pods", lambda: any("GET" in call and "/events" in call for call in operator.calls))
        assert (queue.job(1)["spec"], run.pods(1)) == ({**made["spec"], "suspend": False}, [])
        assert not [call for call in operator.calls if call.startswith("PATCH") and "/jobs/" in call]
        run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": True}}})
        run.wait("suspended", lambda status: status.get("reason") == "Suspended")
        assert run.jobs() == []


def test_a_gang_scheduler_that_is_not_there_is_named(
    run: Run, fast_settings: Callable[..., Settings], namespace: str
) -> None:
    with OperatorThread(fast_settings(namespace, gang_scheduler="volcano")):
        run.create()
        status = run.wait("a word", lambda status: status.get("reason") == "NoPodGroups")
        assert (status["phase"], run.jobs()) == ("Pending", [])
        assert "no PodGroup of volcano. Remedy: Install" in run.condition("Ready")["message"]


CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@contextmanager
def podgroups(api: Api, group: str, version: str) -> Iterator[None]:
    """The kind PodGroup of ``group``, as long as the block runs."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    served = {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": "PodGroup", "listKind": "PodGroupList", "plural": "podgroups", "singular": "podgroup"}
    annotations = {"api-approved.kubernetes.io": "unapproved, a test"}
    spec = {"group": group, "names": names, "scope": "Namespaced", "versions": [served]}
    name = f"podgroups.{group}"
    api.create(CRDS, {"metadata": {"name": name, "annotations": annotations}, "spec": spec})
    try:
        yield
    finally:
        api.delete(f"{CRDS}/{name}")
        eventually("the kind is gone", lambda: name not in [crd["metadata"]["name"] for crd in api.items(CRDS)])


@pytest.mark.parametrize(
    ("scheduler", "group", "version"),
    [("volcano", "scheduling.volcano.sh", "v1beta1"), ("coscheduling", "scheduling.x-k8s.io", "v1alpha1")],
)
def test_a_podgroup_is_made_for_each_attempt_and_goes_with_it(
    run: Run, fast_settings: Callable[..., Settings], namespace: str, scheduler: str, group: str, version: str
) -> None:
    def groups() -> list[Raw]:
        return run.api.items(f"/apis/{group}/{version}/namespaces/{namespace}/podgroups")

    settings = fast_settings(namespace, gang_scheduler=scheduler)
    with podgroups(run.api, group, version), OperatorThread(settings):
        run.create()
        run.set_running(1)
        [made] = groups()
        assert (made["metadata"]["name"], made["spec"]["minMember"]) == ("run-1", 2)
        assert made["metadata"]["ownerReferences"][0]["uid"] == run.raw["metadata"]["uid"]
        assert {pod["spec"]["schedulerName"] for pod in run.pods(1)} <= {"volcano", "scheduler-plugins-scheduler"}
        run.set_failed(1, "Checkpointed", 75)
        run.gang(2)
        assert [made["metadata"]["name"] for made in groups()] == ["run-2"]
        run.set_running(2)
        run.set_succeeded(2)
        run.wait_phase("Succeeded")
        run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 0}}})
        eventually("no PodGroup", lambda: groups() == [])
