"""The cluster, the operator and the runs of the tests with real pods."""

from tests.cluster.conftest import cluster, images, install, runs, store, tiny_data

__all__ = ["cluster", "images", "install", "runs", "store", "tiny_data"]
