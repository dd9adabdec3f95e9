"""What pods can reach that are none of a run's, and what a run's own pods can: with real pods and enforced policies."""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from demo import stack
from devcluster import Cluster, DevclusterError
from devcluster.node import BUSYBOX_IMAGE
from lora_api.run import MASTER_PORT
from tests.cluster.conftest import NAMESPACE, Install
from tests.cluster.runs import Runs
from tests.support.wait import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ENDLESS = {"maxSteps": 100_000, "learningRate": 0.001, "globalBatchSize": 4}
ELSEWHERE, CLOUD = "lora-strangers", "lora-cloud"
METADATA, POD_IDENTITY = "169.254.169.254", "169.254.170.23"

RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Pod:
    """A pod from which connections are tried."""

    cluster: Cluster
    namespace: str
    name: str
    program: tuple[str, ...] = ("nc", "-w", "5")

    @property
    def address(self) -> str:
        return self._kubectl("get", "pod", self.name, "--output=jsonpath={.status.podIP}")

    def reaches(self, address: str, port: int) -> bool:
        """Whether a connection comes about."""
        try:
            self._kubectl("exec", self.name, "--", *self.program, address, str(port), "-e", "true")
        except DevclusterError as error:
            if not any(words in str(error) for words in ("can't connect", "refused", "timed out")):
                raise
            return False
        return True

    def _kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments)


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"


def member(runs: Runs, name: str, index: int) -> Pod:
    """A pod of the run's first attempt."""
    found = [pod["metadata"]["name"] for pod in runs.pods(name)]
    pod = next(pod for pod in found if pod.startswith(f"{name}-1-{index}-"))
    return Pod(runs.cluster, runs.namespace, pod, ("/opt/lora/bin/python", "-c", CONNECT))


MakePod = Callable[..., Pod]


@pytest.fixture
def make_pod(cluster: Cluster, runs: Runs) -> Iterator[MakePod]:
    """Makes small pods, in the namespace of the runs or in another one, and takes them away again."""
    made: list[Pod] = []

    def make(name: str, namespace: str = NAMESPACE, *command: str, **labels: str) -> Pod:
        stack.apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        container = {"name": "c", "image": BUSYBOX_IMAGE, "args": [*command], "securityContext": RESTRICTED}
        spec = {"terminationGracePeriodSeconds": 0, "containers": [container]}
        metadata = {"name": name, "namespace": namespace, "labels": labels}
        stack.apply(cluster, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        made.append(Pod(cluster, namespace, name))
        cluster.kubectl(
            "wait", f"pod/{name}", f"--namespace={namespace}", "--for=condition=Ready", "--timeout=60s", timeout=70
        )
        return made[-1]

    yield make
    for pod in made:
        cluster.kubectl("delete", "pod", pod.name, f"--namespace={pod.namespace}", "--now")


@pytest.fixture(scope="module")
def cloud(cluster: Cluster) -> Iterator[None]:
    """A node of a cloud: something answers on port 80 of the addresses where it has its keys."""
    for address in (METADATA, POD_IDENTITY):
        subprocess.run(cluster.inside(["ip", "addr", "replace", f"{address}/32", "dev", "lo"]), check=True)
    stack.apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": CLOUD}})
    containers = [
        {"name": f"c{number}", "image": BUSYBOX_IMAGE, "args": ["httpd", "-f", "-p", f"{address}:80"]}
        for number, address in enumerate((METADATA, POD_IDENTITY))
    ]
    spec: dict[str, Any] = {"hostNetwork": True, "terminationGracePeriodSeconds": 0, "containers": containers}
    metadata = {"name": "keys", "namespace": CLOUD}
    stack.apply(cluster, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    cluster.kubectl("wait", "pod/keys", f"--namespace={CLOUD}", "--for=condition=Ready", "--timeout=60s", timeout=70)
    yield
    cluster.kubectl("delete", "namespace", CLOUD, timeout=120)
    for address in (METADATA, POD_IDENTITY):
        subprocess.run(cluster.inside(["ip", "addr", "delete", f"{address}/32", "dev", "lo"]), check=True)


def test_nobody_but_its_own_pods_reaches_a_gang(runs: Runs, make_pod: MakePod) -> None:
    """Attack: a pod of another namespace, or of another run, writes `stop` into a gang's TCPStore."""
    name = runs.submit("guarded", training=ENDLESS)
    uid = runs.fetch(name).metadata.uid
    strangers = [
        make_pod("far", ELSEWHERE),
        make_pod("near"),
        make_pod("other-run", NAMESPACE, **{"lorafinetune.io/name": "other", "lorafinetune.io/uid": "other-uid"}),
        make_pod("namesake", ELSEWHERE, **{"lorafinetune.io/name": name, "lorafinetune.io/uid": uid}),
    ]
    runs.wait_step(name, 1)  # its pods have found each other by name, and its log is read
    rank_0, rank_1 = member(runs, name, 0), member(runs, name, 1)

    assert rank_1.reaches(rank_0.address, MASTER_PORT)
    assert [stranger.name for stranger in strangers if stranger.reaches(rank_0.address, MASTER_PORT)] == []

    runs.kubectl("delete", "networkpolicy", name)  # and it is the policy that keeps them out
    for stranger in strangers:
        eventually(f"{stranger.name} gets in", lambda pod=stranger: pod.reaches(rank_0.address, MASTER_PORT))


def test_a_run_does_not_get_the_keys_of_its_node(runs: Runs, make_pod: MakePod, cloud: None) -> None:
    """Attack: code of a run asks the cloud's metadata server for the keys of the node that it runs on."""
    name = runs.submit("curious", training=ENDLESS, parallelism={"nodes": 1})
    free = make_pod("free")
    for address in (METADATA, POD_IDENTITY):
        eventually("something answers there", lambda address=address: free.reaches(address, 80))
    runs.wait_step(name, 1)  # the store, which is at the address of the node, was reached
    pod = member(runs, name, 0)
    assert [address for address in (METADATA, POD_IDENTITY) if pod.reaches(address, 80)] == []
    dns = runs.kubectl("get", "service/kube-dns", "--namespace=kube-system", "--output=jsonpath={.spec.clusterIP}")
    assert pod.reaches(dns, 53)
    served = make_pod("served", ELSEWHERE, "httpd", "-f", "-p", "8000")
    eventually("pods of other namespaces are reached", lambda: pod.reaches(served.address, 8000))


def test_an_identity_opens_its_own_address_and_no_other(
    cluster: Cluster, runs: Runs, make_pod: MakePod, cloud: None
) -> None:
    """Attack: code of a run that gets keys of its own, from the address for that, asks for those of the node too."""
    runtime = {
        "endpoints": {"store": cluster.s3_endpoint},
        "egress": [{"cidr": f"{cluster.node_ip}/32"}],
        "identity": "eksPodIdentity",
    }
    head = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "ClusterLoRARuntime"}
    stack.apply(cluster, {**head, "metadata": {"name": "pod-identity"}, "spec": runtime})
    name = runs.submit("known", training=ENDLESS, parallelism={"nodes": 1}, runtimeRef={"name": "pod-identity"})
    runs.wait_step(name, 1)
    pod, free = member(runs, name, 0), make_pod("free")
    served = make_pod("served", ELSEWHERE, "httpd", "-f", "-p", "8000")
    assert pod.reaches(POD_IDENTITY, 80)
    eventually("others reach it", lambda: free.reaches(served.address, 8000))
    assert [pod.reaches(METADATA, 80), pod.reaches(served.address, 8000)] == [False, False]


def test_only_those_who_are_named_reach_the_metrics(
    cluster: Cluster, runs: Runs, make_pod: MakePod, install: Install
) -> None:
    """Attack: a pod reads the metrics of an operator that leaves it to the network who may."""
    names = {"matchLabels": {"kubernetes.io/metadata.name": ELSEWHERE}}
    prometheus, stranger = make_pod("prometheus", ELSEWHERE), make_pod("stranger")
    install(**{"metrics.auth": "networkPolicy", "metrics.from": [{"namespaceSelector": names}]})
    try:
        where = f"--namespace={stack.SYSTEM_NAMESPACE}"
        pods = json.loads(cluster.kubectl("get", "pods", where, "--output=json"))["items"]
        (address,) = (pod["status"]["podIP"] for pod in pods if "deletionTimestamp" not in pod["metadata"])
        eventually("it is reached by whom it names", lambda: prometheus.reaches(address, 8080))
        eventually("and by no other", lambda: not stranger.reaches(address, 8080))
        assert prometheus.reaches(address, 8080)
    finally:
        install()
