"""Who reads the operator's metrics: names of namespaces, their failures and how much they train."""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import devcluster
from devcluster import binaries
from devcluster.ports import PortLease
from tests.support.install import install_crds
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "lora-operator"
SYSTEM, MONITORING = "lora-system", "monitoring"

Answer = tuple[int, str]
Get = Callable[..., Answer]


@pytest.fixture(scope="module")
def cp() -> Iterator[devcluster.ControlPlane]:
    """The chart's roles, and two ServiceAccounts of a namespace: one may read the metrics, the other may not."""
    with devcluster.control_plane() as running:
        install_crds(running)
        for namespace in (SYSTEM, MONITORING):
            running.kubectl("create", "namespace", namespace)
        kinds = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")
        rights = [item for item in render() if item["kind"] in kinds]
        running.kubectl("apply", "--filename=-", input=yaml.safe_dump_all(rights))
        for account in ("prometheus", "stranger"):
            running.kubectl("create", "serviceaccount", account, f"--namespace={MONITORING}")
        role = ("--clusterrole=lora-operator-metrics-reader", f"--serviceaccount={MONITORING}:prometheus")
        running.kubectl("create", "clusterrolebinding", "prometheus-reads-lora-metrics", *role)
        yield running


def render() -> list[dict[str, Any]]:
    """What the chart makes by default."""
    helm = binaries.ensure(["tools"])["helm"]
    command = [helm, "template", "lora-operator", CHART, f"--namespace={SYSTEM}", "--set=crds.enabled=false"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def token_of(cp: devcluster.ControlPlane, account: str, *flags: str, namespace: str = MONITORING) -> str:
    return cp.kubectl("create", "token", account, f"--namespace={namespace}", *flags).strip()


@contextmanager
def operator(cp: devcluster.ControlPlane, directory: Path, token: str, *flags: str) -> Iterator[Get]:
    """The real process with the rights of ``token``; gives a function that asks it for a path."""
    cluster = {"server": cp.url, "certificate-authority": str(cp.ca)}
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "c",
            }
        )
    )
    lease, log = PortLease(), (directory / "log").open("w")

    def get(path: str, authorization: str | None = None) -> Answer:
        headers = {"Authorization": authorization} if authorization is not None else {}
        request = urllib.request.Request(f"http://127.0.0.1:{lease.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    command = [sys.executable, "-m", "lora_operator", f"--kubeconfig={kubeconfig}", "--http-host=127.0.0.1"]
    child = subprocess.Popen(
        [*command, f"--http-port={lease.port}", *flags],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'operator'}"},
        stderr=log,
    )
    try:
        eventually("readiness", lambda: get("/readyz") == (200, "ok\n"))
        yield get
    finally:
        child.kill()
        child.wait()
        lease.release()
        log.close()


@pytest.fixture(scope="module")
def get(cp: devcluster.ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """An operator as the chart installs it."""
    token = token_of(cp, "lora-operator", namespace=SYSTEM)
    with operator(cp, tmp_path_factory.mktemp("operator"), token) as get:
        yield get


def forge(token: str) -> str:
    """``token`` with the name of another account in it, and the signature that it had."""
    header, payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    claims["sub"] = f"system:serviceaccount:{MONITORING}:prometheus"
    claims["kubernetes.io"]["serviceaccount"]["name"] = "prometheus"
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return ".".join((header, forged, signature))


ATTACKS: dict[str, tuple[Callable[[devcluster.ControlPlane], str | None], int, str]] = {
    "no token": (lambda cp: None, 401, "a token is needed"),
    "an empty token": (lambda cp: "Bearer ", 401, "a token is needed"),
    "a name and a password": (lambda cp: "Basic cHJvbWV0aGV1czp4", 401, "a token is needed"),
    "a token that means nothing": (lambda cp: "Bearer garbage", 401, "does not know this token"),
    "a token whose bearer was given no right": (
        lambda cp: f"Bearer {token_of(cp, 'stranger')}",
        403,
        f"system:serviceaccount:{MONITORING}:stranger may not get /metrics",
    ),
    "a token of one who may, made for another server": (
        lambda cp: f"Bearer {token_of(cp, 'prometheus', '--audience=vault.example.org')}",
        401,
        "is for another audience",
    ),
    "a token with another name written into it": (
        lambda cp: f"Bearer {forge(token_of(cp, 'stranger'))}",
        401,
        "does not know this token",
    ),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_a_pod_without_the_right_reads_no_metrics(cp: devcluster.ControlPlane, get: Get, case: str) -> None:
    """Attack: any pod of the cluster reads who trains how much in other namespaces, from the operator's /metrics."""
    make, status, words = ATTACKS[case]
    found, text = get("/metrics", make(cp))
    assert (found, "lora_operator" in text) == (status, False)
    assert words in text
    assert text.count("\n") == 1


def test_whoever_was_given_the_right_reads_them_and_is_not_asked_about_each_time(
    cp: devcluster.ControlPlane, get: Get
) -> None:
    bearer = f"Bearer {token_of(cp, 'prometheus')}"
    for _ in range(3):
        status, text = get("/metrics", bearer)
        assert status == 200
    (reviews,) = (
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith('lora_operator_api_calls_total{code="201",resource="subjectaccessreviews"')
    )
    assert reviews <= 2, "one for this token, and one of the attacks'"


def test_what_is_open_to_the_kubelet_says_nothing(get: Get) -> None:
    """Attack: any pod of the cluster reads names of runs from the operator's health."""
    assert [get(path) for path in ("/healthz", "/readyz")] == [(200, "ok\n")] * 2
    assert [get(path)[0] for path in ("/", "/metrics/", "/debug")] == [404] * 3


def test_an_operator_that_may_not_ask_lets_nobody_in(cp: devcluster.ControlPlane, tmp_path: Path) -> None:
    """Attack: a pod reads the metrics of an operator whose role is of a version that knew no reviews."""
    cp.kubectl("create", "serviceaccount", "older", f"--namespace={SYSTEM}")
    for role in ("runs", "gangs", "events", "runtimes"):
        flags = (f"--clusterrole=lora-operator-{role}", f"--serviceaccount={SYSTEM}:older")
        cp.kubectl("create", "clusterrolebinding", f"older-{role}", *flags)
    with operator(cp, tmp_path, token_of(cp, "older", namespace=SYSTEM)) as get:
        status, text = get("/metrics", f"Bearer {token_of(cp, 'prometheus')}")
    assert (status, "lora_operator_" in text) == (503, False)
    assert 'cannot create resource "tokenreviews"' in (tmp_path / "log").read_text()


@pytest.mark.parametrize("auth", ["none", "networkPolicy"])
def test_without_tokens_it_is_open_as_the_administrator_has_said(
    cp: devcluster.ControlPlane, tmp_path: Path, auth: str
) -> None:
    with operator(cp, tmp_path, token_of(cp, "lora-operator", namespace=SYSTEM), f"--metrics-auth={auth}") as get:
        status, text = get("/metrics")
    assert (status, "lora_operator_runs" in text) == (200, True)
