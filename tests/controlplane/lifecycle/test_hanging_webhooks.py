"""A webhook that takes calls and never answers holds up its own namespaces, and no others."""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lora_operator.settings import Settings
from tests.support.api import Api, ApiError
from tests.support.operators import OperatorThread
from tests.support.runs import Run
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

HOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
RUNS = 24
JOB = {
    "metadata": {"generateName": "probe-"},
    "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "any", "image": "any"}]}}},
}


@pytest.fixture
def hang(api: Api, namespace: str) -> Iterator[Callable[..., None]]:
    """Makes a webhook hang on Jobs of the namespace."""
    name = f"slow-{namespace}"
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        port = server.getsockname()[1]

        def make(operation: str, seconds: int) -> None:
            hook = {
                "name": "slow.example.org",
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "failurePolicy": "Fail",
                "timeoutSeconds": seconds,
                "clientConfig": {"url": f"https://127.0.0.1:{port}/"},
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "rules": [
                    {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": [operation], "resources": ["jobs"]}
                ],
            }
            api.create(HOOKS, {"metadata": {"name": name}, "webhooks": [{**hook, "timeoutSeconds": 1}]})
            if operation == "CREATE":
                eventually("Jobs are refused", lambda: _is_refused(api, namespace))
            api.patch(f"{HOOKS}/{name}", {"webhooks": [hook]})

        yield make
        api.delete(f"{HOOKS}/{name}")


def _is_refused(api: Api, namespace: str) -> bool:
    try:
        api.create(f"/apis/batch/v1/namespaces/{namespace}/jobs?dryRun=All", JOB)
    except ApiError:
        return True
    return False


def test_runs_of_other_namespaces_start_meanwhile(
    api: Api,
    namespace: str,
    make_namespace: Callable[[], str],
    fast_settings: Callable[..., Settings],
    hang: Callable[..., None],
) -> None:
    other = make_namespace()
    hang("CREATE", 10)
    with OperatorThread(fast_settings(namespace, namespaces=(namespace, other), concurrency=8)):
        slow = [Run(api, namespace, f"slow-{number}").create() for number in range(RUNS)]
        begin = time.monotonic()
        Run(api, other, "quick").create().wait("a Job", lambda status: status.get("attempt") == 1)
        seconds = time.monotonic() - begin
        assert seconds < 5, f"{seconds:.1f} s"
        slow[0].wait("it says so", lambda status: status.get("reason") in ("NoAnswer", "WebhookFailed"))

        def told(words: str) -> Callable[[], Any]:
            return lambda: any(words in run.condition("Ready").get("message", "") for run in slow)

        eventually("the words of the API server", told("slow.example.org"), 60)
