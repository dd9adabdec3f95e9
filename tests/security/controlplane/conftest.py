"""The control plane, runs and operators of the lifecycle's tests."""

from tests.controlplane.lifecycle.conftest import (
    api,
    cp,
    fast_settings,
    make_namespace,
    namespace,
    operator,
    run,
    settings,
)

__all__ = ["api", "cp", "fast_settings", "make_namespace", "namespace", "operator", "run", "settings"]
