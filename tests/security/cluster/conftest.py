"""The cluster, the operator and the runs of tests/cluster, for the attacks that need real pods."""

from tests.cluster.conftest import cluster, images, install, runs, store, tiny_data

__all__ = ["cluster", "images", "install", "runs", "store", "tiny_data"]
