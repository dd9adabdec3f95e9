"""Nodes that go away under a gang, on a cluster of two, with the real trainer: ``make test-nodes``."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import devcluster
from demo import stack
from demo.stack import Store
from devcluster import Cluster
from lora_api import FailureClass, LoRAFineTune, Phase
from tests.cluster.conftest import upload_tiny_data
from tests.cluster.runs import Runs, find_condition

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.nodes,
    pytest.mark.timeout(900),
]

NAME = "lora-nodes"
LONG = {"maxSteps": 150, "learningRate": 0.001, "globalBatchSize": 4}
NODE_SECONDS = 240
AGAIN = "seconds from the loss to the next attempt"

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """A cluster of its own, also where $KUBECONFIG names one: nodes are killed, and those are somebody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KUBECONFIG", raising=False)
        devcluster.down(NAME)
        yield devcluster.up(NAME, nodes=2)
        devcluster.down(NAME)


@pytest.fixture(scope="module")
def store(pair: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(pair)
    upload_tiny_data(store, tmp_path_factory.mktemp("tiny"))
    values = stack.load_images(pair)
    stack.install_operator(pair, {**values, "operator.preflight": False, "operator.terminationGraceSeconds": 40})
    return store


@pytest.fixture
def gang(pair: Cluster, store: Store) -> Iterator[Runs]:
    stack.make_namespace(pair, "lora-tests")
    runs = Runs(pair, store, "lora-tests")
    yield runs
    runs.remove()


def submit(runs: Runs, name: str, **changes: Any) -> str:
    """A run of two pods that do not fit on one node together."""
    half = {"resources": {"requests": {"cpu": "1100m"}, "limits": {"memory": "4Gi"}}}
    runs.submit(name, training=LONG, checkpoint={"everySteps": 5}, podTemplate=half, **changes)
    runs.wait_step(name, 10)
    assert {pod["spec"]["nodeName"] for pod in runs.pods(name)} == set(runs.cluster.nodes)
    return name


def node_of_the_operator(cluster: Cluster) -> str:
    text = cluster.kubectl(
        "get",
        "pods",
        f"--namespace={stack.SYSTEM_NAMESPACE}",
        "--selector=app.kubernetes.io/name=lora-operator",
        "--output=json",
    )
    pods = [pod for pod in json.loads(text)["items"] if "deletionTimestamp" not in pod["metadata"]]
    return str(pods[-1]["spec"]["nodeName"])


def another_node(cluster: Cluster) -> str:
    """The node that the operator is not on."""
    return next(node for node in cluster.nodes if node != node_of_the_operator(cluster))


def classes(run: LoRAFineTune) -> list[FailureClass]:
    return [failure.failure_class for failure in run.status.failures]


def wait_for_the_next_attempt(runs: Runs, name: str, since: float, record: Record) -> LoRAFineTune:
    """Waits for the second attempt, and records how long it took since the node began to go."""
    run = runs.wait(name, "the second attempt waits", lambda run: run.status.attempt == 2, NODE_SECONDS)
    record(AGAIN, round(time.monotonic() - since))
    return run


def test_a_drained_node_hands_its_pod_over_with_a_checkpoint(gang: Runs, record_property: Record) -> None:
    name = submit(gang, "drained")
    node = another_node(gang.cluster)
    since = time.monotonic()
    drain = ["drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=90s"]
    try:
        gang.cluster.kubectl(*drain, timeout=100)
        run = wait_for_the_next_attempt(gang, name, since, record_property)
        assert classes(run) == [FailureClass.EVICTED]
    finally:
        gang.cluster.kubectl("uncordon", node)

    run = gang.wait_end(name)

    assert (run.status.phase, run.status.attempt, run.status.charged_restarts) == (Phase.SUCCEEDED, 2, 0)
    assert_resumed(gang, name)


def test_a_node_that_dies_with_the_operator_on_it_costs_the_run_nothing(gang: Runs, record_property: Record) -> None:
    name = submit(gang, "node-died")
    node = node_of_the_operator(gang.cluster)
    since = time.monotonic()
    gang.cluster.kill_node(node)
    try:
        run = wait_for_the_next_attempt(gang, name, since, record_property)
        assert classes(run) == [FailureClass.NODE_LOST]
        assert (run.status.failures[0].rank, run.status.charged_restarts) == (None, 0)
        gang.wait(name, "why it waits", lambda run: find_condition(run, "Scheduled").reason == "Unschedulable")
    finally:
        gang.cluster.start_node(node)

    run = gang.wait_end(name)

    assert (run.status.phase, run.status.attempt, run.status.charged_restarts) == (Phase.SUCCEEDED, 2, 0)
    assert_resumed(gang, name)


def test_a_node_that_is_out_of_service_is_not_waited_for(gang: Runs, record_property: Record) -> None:
    """The pods of a node with this taint are deleted at once, also where no kubelet answers (KEP-2268)."""
    name = submit(gang, "out-of-service")
    node = another_node(gang.cluster)
    since = time.monotonic()
    gang.cluster.kill_node(node)
    taint = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    gang.cluster.kubectl("taint", "node", node, taint)
    try:
        run = wait_for_the_next_attempt(gang, name, since, record_property)
        assert classes(run) == [FailureClass.NODE_LOST]
    finally:
        gang.cluster.start_node(node)
        gang.cluster.kubectl("taint", "node", node, f"{taint}-")

    run = gang.wait_end(name)

    assert (run.status.phase, run.status.attempt, run.status.charged_restarts) == (Phase.SUCCEEDED, 2, 0)
    assert_resumed(gang, name)


def assert_resumed(runs: Runs, name: str) -> None:
    """The second attempt went on from a checkpoint."""
    pod = next(pod["metadata"]["name"] for pod in runs.pods(name) if pod["metadata"]["name"].startswith(f"{name}-2-0-"))
    steps = [line.step for line in runs.progress_lines(pod) if line.event == "step" and line.step is not None]
    assert steps[0] > 5
    assert steps[-1] == LONG["maxSteps"]
