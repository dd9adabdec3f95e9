"""A control plane with controllers, and an operator in it, as the tests of the life of a run have them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

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
from tests.support.api import Api, Raw

__all__ = ["api", "cp", "fast_settings", "make_namespace", "namespace", "operator", "run", "settings"]

RUNTIMES = "/apis/lorafinetune.io/v1alpha1/clusterloraruntimes"
HEAD = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "ClusterLoRARuntime"}

PutRuntime = Callable[..., Callable[[Raw], None]]


@pytest.fixture
def put_runtime(api: Api, namespace: str) -> Iterator[PutRuntime]:
    """Creates or changes the runtime of the test. Returns what makes a run's spec name it, and have more fields."""
    name = f"of-{namespace}"
    there: list[bool] = []

    def put(**spec: Any) -> Callable[[Raw], None]:
        if there:
            api.patch(f"{RUNTIMES}/{name}", {"spec": spec})
        else:
            api.create(RUNTIMES, {**HEAD, "metadata": {"name": name}, "spec": spec})
            there.append(True)
        return lambda run: run.update(runtimeRef={"name": name})

    yield put
    if there:
        api.delete(f"{RUNTIMES}/{name}")
