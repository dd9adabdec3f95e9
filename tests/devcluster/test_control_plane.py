"""The control plane of the tests: starts, serves, survives kills, and leaves nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import devcluster
from devcluster.progress import wait_for
from tests.support.versions import VERSION

pytestmark = pytest.mark.controlplane


@pytest.fixture(scope="module")
def cp() -> Iterator[devcluster.ControlPlane]:
    with devcluster.control_plane(controller_manager=True, audit_log=True) as running:
        yield running


def test_the_server_reports_the_pinned_version(cp: devcluster.ControlPlane) -> None:
    assert f"Server Version: {VERSION}\n" in cp.kubectl("version")


def test_requests_are_recorded_by_user_agent(cp: devcluster.ControlPlane) -> None:
    cp.kubectl("create", "namespace", "counted")
    verbs = [entry["verb"] for entry in cp.audit_entries("kubectl") if "/namespaces" in entry["requestURI"]]
    assert verbs.count("create") == 1
    assert cp.audit_entries("no such agent") == []


def test_data_survives_a_kill_of_the_api_server_and_of_etcd(cp: devcluster.ControlPlane) -> None:
    cp.kubectl("create", "configmap", "kept", "--from-literal=a=b")
    cp.kill_api_server()
    cp.start_api_server()
    cp.kill_etcd()
    cp.start_etcd()
    assert cp.kubectl("get", "configmap", "kept", "--output=jsonpath={.data.a}") == "b"


def test_the_controllers_make_the_pods_of_a_job(cp: devcluster.ControlPlane) -> None:
    cp.kubectl("create", "job", "work", "--image=none")
    pods = ("get", "pods", "--selector=job-name=work", "--output=name")
    wait_for("the pod of the Job", lambda: cp.kubectl(*pods).startswith("pod/work-"), 20)


def test_rbac_refuses_a_user_without_roles(cp: devcluster.ControlPlane) -> None:
    stranger = cp.write_kubeconfig("stranger", "stranger")
    assert cp.kubectl("auth", "can-i", "list", "pods") == "yes\n"
    with pytest.raises(devcluster.DevclusterError, match='User "stranger" cannot list resource "pods"'):
        cp.kubectl(f"--kubeconfig={stranger}", "get", "pods")


def test_pod_security_refuses_a_privileged_pod(cp: devcluster.ControlPlane) -> None:
    cp.kubectl("create", "namespace", "strict")
    cp.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    with pytest.raises(devcluster.DevclusterError, match='violates PodSecurity "restricted'):
        cp.kubectl("--namespace=strict", "run", "bad", "--image=none", "--privileged")


def test_two_run_side_by_side(cp: devcluster.ControlPlane) -> None:
    with devcluster.control_plane() as other:
        other.kubectl("create", "namespace", "only-here")
        assert other.url != cp.url
        # Without controllers there are no service accounts, and pods need none.
        other.kubectl("run", "pod", "--image=none")
    assert "only-here" not in cp.kubectl("get", "namespaces", "--output=name")


_HOLDER = """
import devcluster, sys
with devcluster.control_plane() as cp:
    print(cp.directory, *cp.pids().values(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_process_and_no_file(number: signal.Signals) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(devcluster.__file__).parent.parent)},
    )
    with holder:
        assert holder.stdout is not None
        directory, *pids = holder.stdout.readline().split()
        assert len(pids) == 2
        holder.send_signal(number)
    wait_for("the processes to end", lambda: not any(Path("/proc", pid).exists() for pid in pids), 10)
    wait_for("the directory to go", lambda: not Path(directory).exists(), 10)
