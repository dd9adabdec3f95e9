"""A whole cluster: pods are real, faults can be made, and nothing is left of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import devcluster
from devcluster import Cluster, DevclusterError, Image, namespaces
from devcluster.cluster import home
from devcluster.node import BUSYBOX_IMAGE
from devcluster.paths import REPOSITORY, cache
from devcluster.progress import wait_for

pytestmark = pytest.mark.cluster

NAME = "devcluster-test"
FAULTS = "devcluster-test-faults"


def lines(*argv: str) -> list[str]:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()


def machine() -> dict[str, list[str]]:
    """What a cluster could leave behind on this machine, less what other clusters and builds own."""
    sysctls = [Path("/proc/sys", name) for name in [*namespaces.KUBELET_SYSCTLS, "net/ipv4/ip_forward"]]
    own = {interface.name for interface in namespaces.find_interfaces(home(NAME) / "run")}
    others = {path.name for path in Path("/sys/class/net").glob("lora*")} - own
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return {
        "mounts": sorted(mount for mount in mounts if not mount.startswith(f"{cache()}/buildah")),
        "interfaces": sorted({path.name for path in Path("/sys/class/net").iterdir()} - others),
        "network namespaces": lines("ip", "netns"),
        "iptables": [line for line in lines("iptables-save") if line.startswith("-")],
        "settings": [path.read_text() for path in sysctls],
        "control groups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob(f"**/devcluster-{NAME}-*-node-*")),
        "processes": processes(),
    }


def processes() -> list[str]:
    """The command lines of the test cluster's processes, which all name its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"/clusters/{NAME}/" in command:
                found.append(command)
    return found


@pytest.fixture(scope="module")
def before() -> dict[str, list[str]]:
    devcluster.down(NAME)
    return machine()


@pytest.fixture(scope="module")
def cluster(before: dict[str, list[str]]) -> Iterator[Cluster]:
    running = devcluster.up(NAME)
    yield running
    devcluster.down(NAME)


def container(*command: str, **fields: Any) -> dict[str, Any]:
    return {"name": "main", "image": BUSYBOX_IMAGE, "args": list(command), **fields}


def pod(name: str, *command: str, **fields: Any) -> dict[str, Any]:
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container(*command, **fields)]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def apply(cluster: Cluster, *manifests: dict[str, Any]) -> None:
    items = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
    cluster.kubectl("apply", "--filename=-", input=json.dumps(items))


def wait(cluster: Cluster, what: str, path: str, value: str, seconds: int = 30) -> None:
    cluster.kubectl("wait", what, f"--for=jsonpath={{{path}}}={value}", f"--timeout={seconds}s", timeout=seconds + 10)


def test_a_second_up_returns_the_same_cluster(cluster: Cluster) -> None:
    assert devcluster.up(NAME) == cluster
    assert devcluster.find(NAME) == cluster
    with pytest.raises(DevclusterError, match=r"is up with 1 node\(s\): end it first"):
        devcluster.up(NAME, nodes=2)


def test_every_part_is_well(cluster: Cluster) -> None:
    assert set(cluster.status().values()) == {"running", "Ready"}


def test_pods_of_an_indexed_job_find_each_other_by_name(cluster: Cluster) -> None:
    peers = [f"peers-{index}.peers.default.svc.cluster.local" for index in (0, 1)]
    ask = " && ".join(f"nslookup {peer}" for peer in peers)
    # A deadline of 5 s in the pod: a name that is asked for too early must not stay unknown.
    script = f"end=$(($(date +%s) + 5)); until {ask}; do [ $(date +%s) -lt $end ] || exit 1; done"
    restricted = {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "peers"},
        "spec": {
            "completions": 2,
            "parallelism": 2,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "subdomain": "peers",
                    "containers": [container("sh", "-c", script, securityContext=restricted)],
                }
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "peers"},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": "peers"}},
    }
    apply(cluster, service, job)
    cluster.kubectl("wait", "job/peers", "--for=condition=Complete", "--timeout=30s")


def test_a_pod_over_its_memory_limit_is_killed_for_that(cluster: Cluster) -> None:
    apply(cluster, pod("greedy", "tail", "/dev/zero", resources={"limits": {"memory": "32Mi"}}))
    wait(cluster, "pod/greedy", ".status.containerStatuses[0].state.terminated.reason", "OOMKilled")


def test_logs_exec_and_the_termination_message_work(cluster: Cluster) -> None:
    script = "echo said; until [ -e /tmp/go ]; do sleep 0.1; done; echo farewell > /dev/termination-log; exit 75"
    apply(cluster, pod("talker", "sh", "-c", script))
    wait(cluster, "pod/talker", ".status.phase", "Running")
    wait_for("the log", lambda: cluster.kubectl("logs", "talker") == "said\n", 10)
    assert cluster.kubectl("exec", "talker", "--", "hostname") == "talker\n"
    cluster.kubectl("exec", "talker", "--", "touch", "/tmp/go")
    wait(cluster, "pod/talker", ".status.containerStatuses[0].state.terminated.message", "farewell\n")
    code = "--output=jsonpath={.status.containerStatuses[0].state.terminated.exitCode}"
    assert cluster.kubectl("get", "pod", "talker", code) == "75"


def test_pods_reach_the_store_and_the_api_and_nothing_outside(cluster: Cluster) -> None:
    script = f"""
        wget -q -O - {cluster.s3_endpoint}/healthz &&
        nslookup kubernetes.default.svc.cluster.local >/dev/null &&
        wget -O - http://kubernetes.default.svc.cluster.local:443/ 2>&1 | grep "400 Bad Request" &&
        ! nslookup outside.test >/dev/null && ! ping -c 1 -w 2 192.0.2.1
    """
    apply(cluster, pod("caller", "sh", "-e", "-c", script))
    wait(cluster, "pod/caller", ".status.phase", "Succeeded")


def test_the_store_accepts_its_keys_only(cluster: Cluster) -> None:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
    from obstore.store import S3Store

    def store(secret: str) -> S3Store:
        return S3Store(
            cluster.bucket,
            endpoint=cluster.s3_endpoint_host,
            access_key_id=cluster.s3_access_key,
            secret_access_key=secret,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    store(cluster.s3_secret_key).put("a", b"data")
    assert bytes(store(cluster.s3_secret_key).get("a").bytes()) == b"data"
    with pytest.raises((PermissionDeniedError, UnauthenticatedError)):
        store("wrong").get("a")


def test_an_image_is_built_and_a_change_reaches_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(
        "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN rm -r /usr/share/doc && touch /made\n"
        'COPY code.py /\nUSER 1000\nENTRYPOINT ["python3", "/code.py"]\n'
    )
    image = Image("devcluster.local/test:dev", dockerfile, context=tmp_path)
    for version in ("one", "two"):
        (tmp_path / "code.py").write_text(
            f"import os\nprint({version!r}, os.getuid(), os.path.exists('/usr/share/doc'))\n"
        )
        assert devcluster.ensure_images(cluster, [image]) == {image.tag: image.tag}
        manifest = pod(f"image-{version}")
        manifest["spec"]["containers"] = [{"name": "main", "image": image.tag}]
        apply(cluster, manifest)
        wait(cluster, f"pod/image-{version}", ".status.phase", "Succeeded")
        assert cluster.kubectl("logs", f"image-{version}") == f"{version} 1000 False\n"


def test_images_stay_when_a_cluster_ends_and_all_else_goes(cluster: Cluster, before: dict[str, list[str]]) -> None:
    apply(cluster, pod("left-running"))
    wait(cluster, "pod/left-running", ".status.phase", "Running")
    devcluster.down(NAME)
    assert machine() == before
    assert not (cache() / "clusters" / NAME / "run").exists()
    again = devcluster.up(NAME)
    assert "left-running" not in again.kubectl("get", "pods", "--output=name")
    manifest = pod("image-kept")
    manifest["spec"]["containers"] = [
        {"name": "main", "image": "devcluster.local/test:dev", "imagePullPolicy": "Never"},
    ]
    apply(again, manifest)
    wait(again, "pod/image-kept", ".status.phase", "Succeeded")


@pytest.mark.parametrize("victim", ["the launcher", "the init", "etcd"])
def test_a_cluster_that_lost_a_part_is_replaced(cluster: Cluster, before: dict[str, list[str]], victim: str) -> None:
    running = devcluster.up(NAME)
    launcher, init = running.pids()
    if victim == "etcd":
        with running.processes() as parts:
            parts.stop("etcd", kill=True)
    else:
        os.kill(launcher if victim == "the launcher" else init, signal.SIGKILL)
        wait_for("all of it to end", lambda: not processes(), 10)
    again = devcluster.up(NAME)
    assert init not in again.pids()
    assert set(again.status().values()) == {"running", "Ready"}
    devcluster.down(NAME)
    assert machine() == before


def test_a_start_that_is_killed_midway_leaves_nothing_after_down(before: dict[str, list[str]]) -> None:
    devcluster.down(NAME)
    code = f"import devcluster; devcluster.up({NAME!r})"
    starting = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.DEVNULL
    )
    directory = cache() / "clusters" / NAME / "run"
    with starting:
        wait_for("the API server to start", (directory / "logs" / "kube-apiserver.log").exists, 30)
        starting.kill()
    assert processes()
    devcluster.down(NAME)
    assert machine() == before


def test_two_starts_at_once_give_one_cluster(before: dict[str, list[str]]) -> None:
    devcluster.down(NAME)
    code = f"import devcluster; print(devcluster.up({NAME!r}).pids())"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    starts = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    answers = {start.communicate(timeout=120)[0] for start in starts}
    assert len(answers) == 1
    devcluster.down(NAME)
    assert machine() == before


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    devcluster.down(FAULTS)
    yield devcluster.up(FAULTS, nodes=2)
    devcluster.down(FAULTS)


def test_pods_of_two_nodes_reach_each_other(pair: Cluster) -> None:
    manifests = []
    for name in pair.nodes:
        manifest = pod(f"on-{name}")
        manifest["spec"]["nodeName"] = name
        manifests.append(manifest)
    apply(pair, *manifests)
    for name in pair.nodes:
        wait(pair, f"pod/on-{name}", ".status.phase", "Running")
    for source, target in (pair.nodes, pair.nodes[::-1]):
        address = pair.kubectl("get", "pod", f"on-{target}", "--output=jsonpath={.status.podIP}")
        pair.kubectl("exec", f"on-{source}", "--", "ping", "-c", "1", "-w", "5", address)


def connects(cluster: Cluster, source: str, address: str) -> bool:
    try:
        cluster.kubectl("exec", source, "--", "nc", "-w", "3", address, "8000", "-e", "true")
    except DevclusterError as error:
        if "can't connect" not in str(error):
            raise
        return False
    return True


def test_a_network_policy_holds_on_either_node(pair: Cluster) -> None:
    """One kube-router guards the pods of both: they have one address, by which it knows its own."""
    addresses = {}
    for name in pair.nodes:
        guarded, stranger = pod(f"guarded-{name}", "httpd", "-f", "-p", "8000"), pod(f"stranger-{name}")
        for manifest in (guarded, stranger):
            manifest["spec"]["nodeName"] = name
        guarded["metadata"]["labels"] = {"gang": "one"}
        apply(pair, guarded, stranger)
        for which in ("guarded", "stranger"):
            wait(pair, f"pod/{which}-{name}", ".status.phase", "Running")
        addresses[name] = pair.kubectl("get", "pod", f"guarded-{name}", "--output=jsonpath={.status.podIP}")
    pairs = [(source, addresses[target]) for source in pair.nodes for target in pair.nodes]
    for source, address in pairs:
        wait_for("the server", lambda s=source, a=address: connects(pair, f"stranger-{s}", a), 10)
    own = {"podSelector": {"matchLabels": {"gang": "one"}}}
    spec = {**own, "policyTypes": ["Ingress"], "ingress": [{"from": [own]}]}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "one"}, "spec": spec}
    apply(pair, policy)
    for source, address in pairs:
        wait_for("the policy", lambda s=source, a=address: not connects(pair, f"stranger-{s}", a), 10)
        assert connects(pair, f"guarded-{source}", address)


def test_parts_can_be_killed_and_started_again(pair: Cluster) -> None:
    pair.kill_api_server()
    with pytest.raises(DevclusterError, match="refused"):
        pair.kubectl("get", "nodes")
    pair.start_api_server()
    pair.kill_kubelet("node-a")
    assert pair.status()["kubelet-node-a"].startswith("ended")
    pair.start_kubelet("node-a")
    pair.kill_node("node-b")
    assert namespaces.cgroup_processes(pair.node("node-b").cgroup) == []
    assert namespaces.cgroup_processes(pair.node("node-a").cgroup) != []
    pair.start_node("node-b")
    assert set(pair.status().values()) == {"running", "Ready"}
