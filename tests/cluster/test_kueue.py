"""Runs in a queue of the real Kueue, which is built from its Go module: ``make test-kueue``."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from demo import stack
from devcluster import Cluster, kueue
from lora_api import LoRAFineTune, Phase
from tests.cluster.conftest import NAMESPACE, Install
from tests.cluster.runs import Runs, find_condition

pytestmark = [pytest.mark.cluster, pytest.mark.kueue, pytest.mark.timeout(1800)]

API = "kueue.x-k8s.io/v1beta2"
QUEUE = "team-a"
QUOTA = [{"name": "cpu", "nominalQuota": "500m"}, {"name": "memory", "nominalQuota": "64Gi"}]
"""Room for the two pods of one gang, which ask for 200m each."""

STEPS = 200
LONG = {"maxSteps": STEPS, "learningRate": 0.001, "globalBatchSize": 4}


def an_object(kind: str, name: str, api: str = API, **fields: Any) -> dict[str, Any]:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, **fields}


@pytest.fixture(scope="module")
def queue(cluster: Cluster, install: Install) -> Iterator[None]:
    """Kueue with one LocalQueue in the tests' namespace, and a quota of one gang that higher priority may take back."""
    kueue.install(cluster)
    stack.make_namespace(cluster, NAMESPACE)
    flavors = [{"name": "any-node", "resources": QUOTA}]
    spec = {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": flavors}],
    }
    local = an_object("LocalQueue", QUEUE, spec={"clusterQueue": "gangs"})
    local["metadata"]["namespace"] = NAMESPACE
    urgent = an_object("PriorityClass", "urgent", "scheduling.k8s.io/v1", value=1000)
    for manifest in (
        an_object("ResourceFlavor", "any-node"),
        an_object("ClusterQueue", "gangs", spec=spec),
        local,
        urgent,
    ):
        stack.apply(cluster, manifest)
    yield
    cluster.kubectl("delete", "priorityclass", "urgent")
    for kind, name in (("clusterqueue", "gangs"), ("resourceflavor", "any-node")):
        cluster.kubectl("delete", f"{kind}.kueue.x-k8s.io", name)
    kueue.uninstall(cluster)


def message(run: LoRAFineTune) -> str:
    return find_condition(run, "Running").message


def test_a_run_waits_for_quota_and_one_whose_quota_is_taken_back_ends_with_the_same_adapter(
    runs: Runs, queue: None
) -> None:
    settings = {"training": LONG, "checkpoint": {"everySteps": 1000}}
    first = runs.submit("first", **settings, runPolicy={"queueName": QUEUE})
    runs.wait_step(first, 10)

    # There is quota for one gang: the second run waits, in Kueue's words and with its number.
    second = runs.submit("second", **settings, runPolicy={"queueName": QUEUE})
    waiting = runs.wait(second, "Kueue says why it waits", lambda run: "insufficient" in str(run.status.conditions))
    assert (waiting.status.phase, waiting.status.attempt) == (Phase.QUEUED, 1)
    assert find_condition(waiting, "Scheduled").reason == "Queued"
    assert message(waiting).startswith(f"Number 1 in queue {QUEUE}: couldn't assign flavors to pod set main")
    assert runs.pods(second) == []

    # One of higher priority takes the quota of the first one back, which is no failure of that.
    urgent = runs.submit("urgent", runPolicy={"queueName": QUEUE, "priorityClassName": "urgent"})
    taken = runs.wait(first, "its quota is taken back", lambda run: run.status.preemptions == 1)
    assert taken.status.phase == Phase.QUEUED
    assert runs.wait_end(urgent).status.phase == Phase.SUCCEEDED

    # It goes on from its checkpoint, before the one that came after it.
    done = runs.wait_end(first, 600)
    assert (done.status.phase, done.status.attempt, done.status.preemptions) == (Phase.SUCCEEDED, 1, 1)
    assert (done.status.failures, done.status.charged_restarts) == ([], 0)
    names = [pod["metadata"]["name"] for pod in runs.pods(first)]
    assert len(names) == 2
    lines = runs.progress_lines(next(name for name in names if name.startswith("first-1-0-")))
    steps = [line.step for line in lines if line.event == "step" and line.step is not None]
    assert (steps[0] > 10, steps[-1]) == (True, STEPS)

    # The second one was never disturbed and trains on the same records: both are equal, bit by bit.
    undisturbed = runs.wait_end(second, 600)
    assert undisturbed.status.preemptions == 0
    assert done.status.completion_time is not None
    assert started(runs, second) >= done.status.completion_time.isoformat()[:19]
    assert done.status.adapter is not None
    assert undisturbed.status.adapter is not None
    assert done.status.adapter.digest == undisturbed.status.adapter.digest

    listing = runs.kubectl("get", "events", f"--field-selector=involvedObject.uid={done.metadata.uid}", "--output=json")
    notes = {event["reason"]: event["message"] for event in json.loads(listing)["items"]}
    assert "Kueue took the quota back: Preempted to accommodate a workload" in notes["Preempted"]


def started(runs: Runs, name: str) -> str:
    """When the first pod of the run was made."""
    return min(pod["metadata"]["creationTimestamp"] for pod in runs.pods(name))


def test_a_queue_that_is_not_there_is_named_and_kueue_sees_the_topology_that_the_pods_ask_for(
    runs: Runs, queue: None
) -> None:
    annotations = {"kueue.x-k8s.io/podset-preferred-topology": "kubernetes.io/hostname"}
    name = runs.submit("lost", runPolicy={"queueName": "nowhere"}, podTemplate={"annotations": annotations})
    run = runs.wait(name, "Kueue names the queue", lambda run: "LocalQueue nowhere" in str(run.status.conditions), 60)
    assert run.status.phase == Phase.QUEUED
    assert "Remedy: See kubectl describe localqueue" in message(run)
    workloads = json.loads(runs.kubectl("get", "workloads.kueue.x-k8s.io", "--output=json"))["items"]
    [workload] = [item for item in workloads if item["spec"]["queueName"] == "nowhere"]
    assert workload["spec"]["podSets"][0]["topologyRequest"]["preferred"] == "kubernetes.io/hostname"


def workload_of(runs: Runs, job: str) -> dict[str, Any]:
    """The Workload that Kueue made for ``job``."""
    items = json.loads(runs.kubectl("get", "workloads.kueue.x-k8s.io", "--output=json"))["items"]
    [found] = [item for item in items if item["metadata"]["ownerReferences"][0]["name"] == job]
    return dict(found)


def evictions(workload: dict[str, Any]) -> int:
    stats = workload["status"].get("schedulingStats", {})
    return sum(entry["count"] for entry in stats.get("evictions", []))


def stop_queue(cluster: Cluster, policy: str) -> None:
    cluster.kubectl(
        "patch",
        "clusterqueue.kueue.x-k8s.io",
        "gangs",
        "--type=merge",
        f'--patch={{"spec": {{"stopPolicy": "{policy}"}}}}',
    )


def test_a_restart_loses_its_quota_its_place_and_its_evictions(cluster: Cluster, runs: Runs, queue: None) -> None:
    """What docs/scheduling.md says of it: if Kueue keeps any of these one day, this test fails and the page is old."""
    settings = {"training": LONG, "checkpoint": {"everySteps": 20}, "runPolicy": {"queueName": QUEUE}}
    early = runs.submit("early", **settings)
    runs.wait_step(early, 5)
    stop_queue(cluster, "HoldAndDrain")
    runs.wait(early, "its quota is taken back", lambda run: run.status.preemptions == 1)
    stop_queue(cluster, "None")
    runs.wait(early, "it goes on", lambda run: run.status.phase == Phase.RUNNING)
    before = workload_of(runs, "early-1")
    assert evictions(before) == 1, "one that is only suspended keeps its Workload"
    late = runs.submit("late", **{**settings, "training": {"maxSteps": 4}})
    runs.wait(late, "it is in the queue", lambda run: run.status.phase == Phase.QUEUED)

    runs.kubectl("delete", "pod", runs.pods(early)[0]["metadata"]["name"], "--wait=false")
    restarted = runs.wait(early, "a second attempt", lambda run: run.status.attempt == 2)
    assert restarted.status.charged_restarts == 0
    assert runs.wait_end(late).status.phase == Phase.SUCCEEDED
    waited = runs.fetch(early)
    assert (waited.status.attempt, waited.status.phase in (Phase.QUEUED, Phase.STARTING)) == (2, True), "it waited"
    after = workload_of(runs, "early-2")
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["metadata"]["creationTimestamp"] > workload_of(runs, "late-1")["metadata"]["creationTimestamp"]
    assert evictions(after) == 0
    assert runs.wait_end(early, 600).status.phase == Phase.SUCCEEDED


def test_where_kueue_takes_up_every_job_preflight_and_gang_are_admitted_or_it_is_said_why(
    cluster: Cluster, runs: Runs, queue: None, preflight: None
) -> None:
    kueue.install(cluster, every_job=True)
    try:
        queued = runs.submit("queued", runPolicy={"queueName": QUEUE})
        assert runs.wait_end(queued).status.phase == Phase.SUCCEEDED
        alone = runs.submit("alone")
        held = "Kueue holds Job {} back, which names no queue"
        waiting = runs.wait(
            alone, "its preflight is held back", lambda run: held.format("alone-pre1") in str(run.status.conditions)
        )
        assert (waiting.status.phase, waiting.status.reason) == (Phase.PREFLIGHT, "Queued")
        assert held.format("alone-pre1") in find_condition(waiting, "PreflightPassed").message
        runs.kubectl("label", "job", "alone-pre1", f"kueue.x-k8s.io/queue-name={QUEUE}")
        gang = runs.wait(
            alone, "its gang is held back", lambda run: held.format("alone-1") in str(run.status.conditions)
        )
        assert gang.status.phase == Phase.QUEUED
        assert held.format("alone-1") in message(gang)
        runs.kubectl("label", "job", "alone-1", f"kueue.x-k8s.io/queue-name={QUEUE}")
        assert runs.wait_end(alone).status.phase == Phase.SUCCEEDED
    finally:
        kueue.install(cluster)
