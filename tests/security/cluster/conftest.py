"""Attacks with real pods, on the cluster and with the images of tests/cluster."""

from tests.cluster.conftest import cluster, images  # noqa: F401 - fixtures
