"""Two namespaces are served, and one of them goes, or the operator's role in it: the other one is served on."""

from collections.abc import Callable
from typing import Any

import kopf
import pytest

import devcluster
from lora_operator.kube.rights import RBAC
from lora_operator.settings import Settings
from lora_operator.watched import refused, watch
from tests.support.api import Api, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

GROUP = "rbac.authorization.k8s.io"
USER = "two-namespaces"


def rules(*, cluster: bool) -> list[Raw]:
    return [
        {
            "apiGroups": [rule.group],
            "resources": list(rule.resources),
            "verbs": list(rule.verbs),
            **({"resourceNames": list(rule.names)} if rule.names else {}),
        }
        for rule in RBAC
        if rule.cluster == cluster and rule.group  # what has no group is named below
    ] + ([] if cluster else [{"apiGroups": [""], "resources": ["*"], "verbs": ["*"]}])


class Roles:
    """The operator's role in a namespace, which can be taken away."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def bind(self, namespace: str | None) -> None:
        kind = "Role" if namespace else "ClusterRole"
        subject = {"apiGroup": GROUP, "kind": "User", "name": USER}
        ref = {"apiGroup": GROUP, "kind": kind, "name": USER}
        at = self._path(namespace)
        self._api.create(f"{at}s", {"metadata": {"name": USER}, "rules": rules(cluster=namespace is None)})
        self._api.create(f"{at}bindings", {"metadata": {"name": USER}, "roleRef": ref, "subjects": [subject]})

    def take(self, namespace: str) -> None:
        for kind in ("bindings", "s"):
            self._api.delete(f"{self._path(namespace)}{kind}/{USER}")

    def give(self, namespace: str) -> None:
        self.bind(namespace)

    def _path(self, namespace: str | None) -> str:
        return f"/apis/{GROUP}/v1/" + (f"namespaces/{namespace}/role" if namespace else "clusterrole")


@pytest.fixture(scope="module")
def roles(api: Api) -> Roles:
    found = Roles(api)
    found.bind(None)
    return found


@pytest.fixture
def two(make_namespace: Callable[[], str]) -> tuple[str, str]:
    return make_namespace(), make_namespace()


@pytest.fixture
def served(
    cp: devcluster.ControlPlane,
    fast_settings: Callable[..., Settings],
    two: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    """Settings of an operator with a role in each namespace, whose watches are short, as what is open stays allowed."""
    build = watch.build_kopf_settings

    def build_short(settings: Settings) -> kopf.OperatorSettings:
        ours = build(settings)
        ours.watching.server_timeout = 1
        ours.networking.error_backoffs = [0.1]
        return ours

    monkeypatch.setattr(watch, "build_kopf_settings", build_short)
    monkeypatch.setattr(refused, "RETRY_SECONDS", 0.5)
    return fast_settings("", namespaces=two, kubeconfig=str(cp.write_kubeconfig(USER, USER)))


def train(run: Run) -> None:
    """A whole life."""
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    run.set_succeeded(1)
    run.wait_phase("Succeeded")


def is_refused(operator: OperatorThread, namespace: str) -> Any:
    return operator.operator.refused.names() == [namespace]


def test_a_role_that_goes_while_the_operator_works(
    api: Api, roles: Roles, two: tuple[str, str], served: Settings
) -> None:
    for namespace in two:
        roles.give(namespace)
    here, there = Run(api, two[0]), Run(api, two[1])
    with OperatorThread(served) as operator:
        there.create()
        there.set_running(1)
        there.wait_phase("Running")
        roles.take(two[1])
        eventually("that it is noticed", lambda: is_refused(operator, two[1]))
        train(here)
        there.set_succeeded(1)  # while nobody may look
        other = Run(api, two[1], "other").create()
        train(Run(api, two[0], "second"))
        assert other.status == {}
        roles.give(two[1])
        there.wait_phase("Succeeded", 60)
        other.wait_phase("Starting")
        assert operator.operator.refused.names() == []


def test_a_role_that_is_not_there_when_the_operator_begins(
    api: Api, roles: Roles, two: tuple[str, str], served: Settings
) -> None:
    roles.give(two[0])
    there = Run(api, two[1]).create()
    with OperatorThread(served) as operator:
        train(Run(api, two[0]))
        assert is_refused(operator, two[1])
        assert operator.operator.ready
        roles.give(two[1])
        there.set_running(1, 2)
        there.wait_phase("Running", 60)


def test_a_role_that_goes_is_noticed_by_what_is_refused(
    api: Api, roles: Roles, two: tuple[str, str], fast_settings: Callable[..., Settings], cp: devcluster.ControlPlane
) -> None:
    """A watch that is open stays allowed, for minutes."""
    for namespace in two:
        roles.give(namespace)
    there = Run(api, two[1])
    with OperatorThread(fast_settings("", namespaces=two, kubeconfig=str(cp.write_kubeconfig(USER, USER)))) as operator:
        there.create()
        there.wait_phase("Starting")
        roles.take(two[1])
        there.set_running(1)
        eventually("that it is noticed", lambda: is_refused(operator, two[1]))
        train(Run(api, two[0]))


def test_a_namespace_that_goes(api: Api, roles: Roles, two: tuple[str, str], served: Settings) -> None:
    for namespace in two:
        roles.give(namespace)
    there = Run(api, two[1])
    with OperatorThread(served) as operator:
        there.create()
        there.wait_phase("Starting")
        api.delete(f"/api/v1/namespaces/{two[1]}")
        eventually("that it is gone", lambda: is_refused(operator, two[1]), 90)
        train(Run(api, two[0]))
        gone = (two[1], "run")
        eventually("that its run is forgotten", lambda: gone not in operator.operator.cache.run_keys())
