"""A real one-machine Kubernetes from pinned Go modules, for the demo and the tests.

``control_plane()`` gives an API server in seconds; ``up()`` a whole cluster with pods.
"""

from devcluster.cluster import Cluster, find
from devcluster.controlplane import ControlPlane, control_plane
from devcluster.external import external_cluster
from devcluster.images import Image, ensure_images
from devcluster.progress import DevclusterError
from devcluster.start import down, up

__all__ = [
    "Cluster",
    "ControlPlane",
    "DevclusterError",
    "Image",
    "control_plane",
    "down",
    "ensure_images",
    "external_cluster",
    "find",
    "up",
]
