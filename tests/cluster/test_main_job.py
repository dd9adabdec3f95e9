"""The main job in real pods: SmolLM2-135M learns to turn tickets into JSON, on two nodes, with NF4 and FSDP2."""

import json

import obstore
import pytest
import yaml

from demo import stack
from demo.__main__ import MANIFEST, evaluate
from lora_api import Phase
from lora_api.adapter import AdapterManifest, compute_digest
from tests.cluster.runs import Runs, find_condition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2700), pytest.mark.usefixtures("preflight")]

PATIENCE = 900
"""Seconds for the first step, and from the last one until all is evaluated and published: two minutes each on two quiet
cores."""


def test_the_quickstart_learns_its_task_and_publishes_an_adapter(runs: Runs) -> None:
    stack.upload_demo_data(runs.store)
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    runs.submit("tickets", **spec)

    seen = []
    run = runs.wait(
        "tickets", "a first step", lambda run: bool(run.status.progress and run.status.progress.step), PATIENCE
    )
    while run.status.phase not in (Phase.SUCCEEDED, Phase.FAILED):
        assert run.status.progress is not None
        seen.append(run.status.progress)
        last = seen[-1]
        run = runs.wait(
            "tickets",
            f"progress after step {last.step}",
            lambda run, last=last: run.status.progress != last or run.status.phase == Phase.SUCCEEDED,
            PATIENCE,
        )

    # Phase, percent, loss and ETA were there and moved.
    assert len({progress.percent for progress in seen}) >= 3
    assert len({progress.loss for progress in seen}) >= 3
    assert any(progress.eta for progress in seen)
    assert run.status.phase == Phase.SUCCEEDED
    assert run.status.attempt == 1
    for kind in ("PreflightPassed", "Ready", "Complete", "Published"):
        assert find_condition(run, kind).status == "True"
    assert run.status.progress is not None
    steps = spec["training"]["maxSteps"]
    assert (run.status.progress.step, run.status.progress.percent) == (steps, 100)

    # What was looked at beforehand is what was trained.
    assert run.status.plan is not None
    assert (run.status.plan.total_steps, run.status.plan.shard_size) == (steps, 2)

    # It really sharded over two pods, which had no credentials of Kubernetes, nor had that of the preflight.
    pods = runs.pods("tickets")
    assert len(pods) == 3
    assert {pod["spec"]["automountServiceAccountToken"] for pod in pods} == {False}

    # The adapter is whole, is what its digest says, and is better than the base model.
    adapter = run.status.adapter
    assert adapter is not None
    path = adapter.uri.removeprefix(f"s3://{runs.cluster.bucket}/").rstrip("/")
    manifest = AdapterManifest.model_validate_json(
        bytes(obstore.get(runs.store.open(), f"{path}/manifest.json").bytes())
    )
    assert manifest.digest == adapter.digest == compute_digest(manifest.files)
    assert {file.path for file in manifest.extras} >= {"README.md", "report.html"}
    for file in [*manifest.files, *manifest.extras]:
        assert obstore.head(runs.store.open(), f"{path}/{file.path}")["size"] == file.size
    before, after = evaluate(runs.store, run, None), evaluate(runs.store, run, adapter)
    served = adapter.served
    assert served is not None
    assert served.before.loss == pytest.approx(before["evalLoss"], rel=1e-3)
    assert served.after.loss == pytest.approx(after["evalLoss"], rel=1e-3)
    assert served.after.share == pytest.approx(after["exactRate"], abs=0.02)
    assert after["evalLoss"] < before["evalLoss"] / 2
    assert before["exactRate"] < 0.05
    assert after["exactRate"] >= 0.9, "on the base model as it is served, not quantized"
    assert served.training.share is not None
    assert served.training.share > 0.8, "on the base model that it was trained on"

    # What a person sees.
    table = runs.kubectl("get", "lft", "tickets")
    assert "Succeeded" in table
    assert "100%" in table
    assert "tickets-v" in table
    selector = f"--field-selector=involvedObject.uid={run.metadata.uid}"  # not an earlier run of this name
    events = json.loads(runs.kubectl("get", "events", selector, "--output=json"))
    reasons = [event["reason"] for event in events["items"]]
    assert len(reasons) == len(set(reasons)), "an event was sent twice"
