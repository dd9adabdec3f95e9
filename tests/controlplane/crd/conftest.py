"""A control plane that knows the CRD, and judges without keeping."""

import json
from collections.abc import Iterator

import pytest

import devcluster
from devcluster.progress import wait_for
from tests.support.crd import MINIMAL, DryRun, manifest
from tests.support.install import install_crds


@pytest.fixture(scope="session")
def cp(control_plane: devcluster.ControlPlane) -> devcluster.ControlPlane:
    install_crds(control_plane)

    def published() -> bool:
        """The schema comes some time after the resource is served, and kubectl keeps on disk what it once found."""
        control_plane.kubectl("api-resources", "--cached=false")
        try:
            texts = [control_plane.kubectl("explain", name) for name in ("lft", "clr")]
            return "LoRAFineTune" in texts[0] and "ClusterLoRARuntime" in texts[1]
        except devcluster.DevclusterError:
            return False

    wait_for("the schemas to be published", published, 30)
    return control_plane


@pytest.fixture(scope="module")
def dry(cp: devcluster.ControlPlane) -> Iterator[DryRun]:
    """One connection for a module: the server closes one that lies idle, as it would while other modules run."""
    dry = DryRun(cp)
    yield dry
    dry.close()


@pytest.fixture
def living(cp: devcluster.ControlPlane) -> Iterator[str]:
    cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(MINIMAL, "living")))
    yield "living"
    cp.kubectl("delete", "lft", "living")
