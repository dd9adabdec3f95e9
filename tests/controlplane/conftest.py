"""One control plane for all tests of a worker; a test that kills or counts things starts its own."""

from collections.abc import Iterator

import pytest

import devcluster


@pytest.fixture(scope="session")
def control_plane() -> Iterator[devcluster.ControlPlane]:
    """etcd and an API server, without controllers."""
    with devcluster.control_plane() as running:
        yield running
