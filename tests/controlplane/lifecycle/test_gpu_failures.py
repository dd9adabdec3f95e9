"""Every row of the table of GPU errors on a real API server: from the launcher's own words to ``status.failures``."""

from datetime import UTC, datetime, timedelta

import pytest

from lora_api import RULES
from lora_trainer.gpuerrors import GPU_ERRORS, Blame
from tests.support.api import Api, Raw
from tests.support.gpuwords import key_of, read_words, termination_at
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, running, termination

pytestmark = pytest.mark.controlplane


def once(spec: Raw) -> None:
    """No restart that counts: what is retried of each class is the lifecycle's test."""
    spec["runPolicy"] = {"maxRestarts": 0}


def start(run: Run, pod: Raw, node: str) -> None:
    """Brings ``pod`` to ``node``, where it runs: a gang that was not whole when it failed is judged otherwise."""
    name = pod["metadata"]["name"]
    target = {"apiVersion": "v1", "kind": "Node", "name": node}
    path = f"/api/v1/namespaces/{run.namespace}/pods/{name}/binding"
    run.api.create(path, {"metadata": {"name": name}, "target": target})
    run.set_pod(pod, running())


def test_every_row_reaches_the_status(api: Api, namespace: str, operator: OperatorThread) -> None:
    """A run for each row. Another pod has lost its peer, and says so first, where it is not the row that says it."""
    for node in ("gpu-1", "gpu-7"):
        api.create("/api/v1/nodes", {"metadata": {"name": node}})
    words, at = read_words(), datetime.now(UTC)
    runs = [Run(api, namespace, f"row-{number}").create(once) for number in range(len(GPU_ERRORS))]
    for row, run in zip(GPU_ERRORS, runs, strict=True):
        entry, (first, second) = words[key_of(row)], run.gang(1)
        earlier = at + timedelta(seconds=5 if row.blame is Blame.PEER else -5)
        start(run, first, "gpu-1")
        start(run, second, "gpu-7")
        run.set_pod(first, ended(73, termination("PeerLost", "closed", rank=0, at=earlier.isoformat())))
        run.set_pod(second, ended(entry["exitCode"], termination_at(entry, at)))
    for row, run in zip(GPU_ERRORS, runs, strict=True):
        entry, rule = words[key_of(row)], RULES[row.failure_class]
        if (rule.retried and not rule.charged) or rule.elsewhere:
            status = run.wait("attempt 2", lambda status: status.get("attempt") == 2, 60)
        else:
            status = run.wait_phase("Failed", 60)
        [failure] = status["failures"]
        assert (failure["class"], failure["node"], failure["rank"]) == (row.failure_class, "gpu-7", 0), row.text
        elsewhere = "The next attempt avoids node gpu-7. If another node says the same, the run ends: "
        assert failure["remedy"] == (elsewhere if rule.elsewhere else "") + (row.remedy or rule.remedy)
        assert failure["message"] == ("Node gpu-7, " if rule.node else "") + entry["words"]["message"]
        assert failure["exitCode"] == entry["exitCode"]
