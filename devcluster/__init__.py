"""A real one-machine Kubernetes from pinned Go modules, for the demo and the tests.

``control_plane()`` gives an API server in seconds; ``up()`` a whole cluster with pods.
"""

from devcluster.controlplane import ControlPlane, control_plane
from devcluster.progress import DevclusterError

__all__ = ["ControlPlane", "DevclusterError", "control_plane"]
