"""One control plane with controllers a worker; a namespace of its own for every test."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import devcluster
from lora_operator.settings import Settings
from tests.support.api import Api
from tests.support.install import install_crds
from tests.support.operators import OperatorThread
from tests.support.runs import Run
from tests.support.wait import eventually

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def cp() -> Iterator[devcluster.ControlPlane]:
    with devcluster.control_plane(controller_manager=True, audit_log=True) as running:
        install_crds(running)
        yield running


@pytest.fixture(scope="session")
def api(cp: devcluster.ControlPlane) -> Api:
    return Api(cp.kubeconfig)


@pytest.fixture(scope="session")
def make_namespace(api: Api) -> Callable[[], str]:
    """Makes namespaces under the restricted Pod Security standard."""

    def make() -> str:
        name = f"test-{next(_numbers)}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        api.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        accounts = f"/api/v1/namespaces/{name}/serviceaccounts"
        eventually("the default service account", lambda: api.items(accounts))
        return name

    return make


@pytest.fixture
def namespace(make_namespace: Callable[[], str]) -> str:
    return make_namespace()


@pytest.fixture
def run(api: Api, namespace: str) -> Run:
    return Run(api, namespace)


@pytest.fixture(scope="session")
def fast_settings(cp: devcluster.ControlPlane) -> Callable[..., Settings]:
    """Settings under which nothing takes long."""

    def make(namespace: str, **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "kubeconfig": str(cp.kubeconfig),
            "namespaces": (namespace,),
            "concurrency": 2,
            "preflight": "off",
            "failure_grace": 1.0,
            "node_grace": 2.0,
            "start_timeout": 2.0,
            "restart_backoff": 0.1,
            "log_interval": 0.2,
            "progress_interval": 0.3,
            "confirm_after": 3.0,
        }
        return Settings(**{**values, **changes})

    return make


@pytest.fixture
def settings(fast_settings: Callable[..., Settings], namespace: str) -> Settings:
    return fast_settings(namespace)


@pytest.fixture
def operator(settings: Settings) -> Iterator[OperatorThread]:
    with OperatorThread(settings) as running:
        yield running
