"""Every row of the table of GPU errors on a real API server: from the launcher's own words to ``status.failures``."""

from datetime import UTC, datetime, timedelta

import pytest

from lora_api import RULES
from lora_trainer.gpuerrors import GPU_ERRORS, Blame
from tests.support.api import Api
from tests.support.gpuwords import key_of, read_words, termination_at
from tests.support.operators import OperatorThread
from tests.support.runs import Run, termination

pytestmark = pytest.mark.controlplane

NODES = ("gpu-1", "gpu-7")


def place(run: Run, nodes: tuple[str, ...]) -> None:
    """Binds the pods of the first attempt, in the order of their indexes."""
    for pod, node in zip(run.gang(1), nodes, strict=True):
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        path = f"/api/v1/namespaces/{run.namespace}/pods/{name}/binding"
        run.api.create(path, {"metadata": {"name": name}, "target": target})


def test_every_row_reaches_the_status(api: Api, namespace: str, operator: OperatorThread) -> None:
    """A run for each row; rank 0's pod has lost its peer, and said so first."""
    for node in NODES:
        api.create("/api/v1/nodes", {"metadata": {"name": node}})
    words = read_words()
    runs = [Run(api, namespace, f"row-{number}").create() for number in range(len(GPU_ERRORS))]
    for row, run in zip(GPU_ERRORS, runs, strict=True):
        entry, at = words[key_of(row)], datetime.now(UTC) - timedelta(seconds=30)
        place(run, NODES)
        peer_at = at + timedelta(seconds=5 if row.blame is Blame.PEER else -5)
        run.set_ended(1, 0, 73, termination("PeerLost", "closed", rank=0, at=peer_at.isoformat()))
        run.set_ended(1, 1, entry["exitCode"], termination_at(entry, at))
    for row, run in zip(GPU_ERRORS, runs, strict=True):
        entry, rule = words[key_of(row)], RULES[row.failure_class]
        if rule.retried:
            status = run.wait("attempt 2", lambda status: status.get("attempt") == 2, 60)
            assert status.get("chargedRestarts", 0) == int(rule.charged), row.text
        else:
            status = run.wait_phase("Failed", 60)
        [failure] = status["failures"]
        assert (failure["class"], failure["node"], failure["rank"]) == (row.failure_class, "gpu-7", 0), row.text
        assert failure["remedy"] == (row.remedy or rule.remedy)
        assert failure["message"] == ("Node gpu-7, " if rule.node else "") + entry["words"]["message"]
        assert failure["exitCode"] == entry["exitCode"]
