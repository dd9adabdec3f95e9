"""Three releases, and one control plane a worker."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import devcluster
from tests.skew import releases
from tests.skew.releases import Release
from tests.support.api import Api
from tests.support.install import wait_for_crds
from tests.support.wait import eventually

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def before() -> Release:
    return releases.before()


@pytest.fixture(scope="session")
def today() -> Release:
    return releases.today()


@pytest.fixture(scope="session")
def after(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return releases.after(tmp_path_factory.mktemp("skew") / "after")


@pytest.fixture(scope="session")
def cp() -> Iterator[devcluster.ControlPlane]:
    with devcluster.control_plane(controller_manager=True, audit_log=True) as running:
        yield running


@pytest.fixture(scope="session")
def api(cp: devcluster.ControlPlane) -> Api:
    return Api(cp.kubeconfig)


@pytest.fixture
def install(cp: devcluster.ControlPlane) -> Callable[[Release], None]:
    """Puts the CRDs of a release in the place of those that are there."""

    def apply(release: Release) -> None:
        cp.kubectl("apply", f"--filename={release.crds}", "--server-side", "--force-conflicts")
        wait_for_crds(cp)

    return apply


@pytest.fixture
def namespace(api: Api) -> str:
    name = f"skew-{next(_numbers)}"
    api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    eventually("the default service account", lambda: api.items(f"/api/v1/namespaces/{name}/serviceaccounts"))
    return name


@pytest.fixture
def log_of(tmp_path: Path) -> Callable[[str], Path]:
    """Where an operator writes what it says."""
    return lambda name: tmp_path / f"{name}.log"
