"""Real pods, real Secrets: what reaches the trainer of them, and what it repeats."""

from collections.abc import Iterator

import pytest

from demo import stack
from lora_api import Phase
from tests.cluster.runs import Runs, find_condition

pytestmark = pytest.mark.cluster

SECRET = "planted"


def put_secret(runs: Runs, **more: str) -> None:
    """The keys of the store, and ``more``."""
    data = {
        "AWS_ACCESS_KEY_ID": runs.cluster.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": runs.cluster.s3_secret_key,
        "AWS_REGION": stack.REGION,
        **more,
    }
    metadata = {"name": SECRET, "namespace": runs.namespace}
    stack.apply(runs.cluster, {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data})


@pytest.fixture(autouse=True)
def no_secret(runs: Runs) -> Iterator[None]:
    """Before and after a test there is none."""
    runs.kubectl("delete", "secret", SECRET, "--ignore-not-found")
    yield
    runs.kubectl("delete", "secret", SECRET, "--ignore-not-found")


def test_keys_that_would_replace_code_and_servers(runs: Runs) -> None:
    """Attack: somebody who may write a Secret puts PYTHONPATH, LD_PRELOAD and AWS_ENDPOINT_URL into it.

    The run trains and publishes: its own code is found, and its own store.
    """
    put_secret(runs, PYTHONPATH="/nowhere", LD_PRELOAD="/nowhere.so", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    run = runs.wait_end(runs.submit("planted-keys", credentials={"secretRef": {"name": SECRET}}))
    assert run.status.phase == Phase.SUCCEEDED
    assert run.status.failures == []


def test_a_secret_is_not_repeated_in_the_status(runs: Runs) -> None:
    """Attack: a user who may not read the Secret has the trainer repeat one of its keys in a message."""
    put_secret(runs)
    env = [{"name": "LORA_SPEED", "value": "$(AWS_SECRET_ACCESS_KEY)"}]
    name = runs.submit("repeated", credentials={"secretRef": {"name": SECRET}}, podTemplate={"env": env})
    run = runs.wait_end(name)
    assert run.status.reason == "BadSpec"
    assert "there is no lever $(AWS_SECRET_ACCESS_KEY);" in find_condition(run, "Stalled").message
    said = runs.kubectl("get", "lft", name, "--output=json")
    said += "".join(runs.kubectl("logs", pod["metadata"]["name"]) for pod in runs.pods(name))
    assert runs.cluster.s3_secret_key not in said


def test_a_secret_that_comes_later_is_waited_for(runs: Runs) -> None:
    """Keys may be missing one by one, but a pod without its Secret does not start, and starts once it is there."""
    name = runs.submit("later", credentials={"secretRef": {"name": SECRET}})
    run = runs.wait(name, "a condition names the Secret", lambda run: SECRET in str(run.status.conditions), 60)
    assert 'CreateContainerConfigError: secret "planted" not found' in find_condition(run, "Running").message
    put_secret(runs)
    assert runs.wait_end(name).status.phase == Phase.SUCCEEDED
