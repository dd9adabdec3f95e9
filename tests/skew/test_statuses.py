"""Today's operator and the statuses of other releases: it goes on with each run from where it is, and loses nothing."""

import copy
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from lora_api.status import STATUS_VERSION
from lora_operator.lifecycle.decide import decide
from lora_operator.settings import Settings
from lora_operator.state.reading import InvalidRunError, parse_run
from lora_operator.state.reports import Reports
from lora_operator.state.runtimes import resolve
from lora_operator.state.trainers import choose_trainer, keep_trainer
from lora_operator.status.compute import compute_status
from lora_operator.watched.views import parse_job, parse_pod
from tests.skew.nextrelease import NEW_CLASS, NEW_FIELD, NEW_PHASE
from tests.skew.releases import RECORDED
from tests.skew.story import STATES
from tests.support.runs import now
from tests.unit.operator.builders import seen

Raw = dict[str, Any]
SETTINGS = Settings(trainer_image="trainer:today", preflight="off")


def recorded(state: str) -> Raw:
    """A run of the release before, with its children."""
    document: Raw = json.loads((RECORDED / f"{state}.json").read_text())
    return document


def by_the_release_before(state: str) -> Raw:
    return recorded(state)


def marked_by_the_release_before(state: str) -> Raw:
    """After a CRD that was a field ahead: it marked every run, and left the rest as it was."""
    document = recorded(state)
    status = document["run"]["status"]
    status["reason"] = "InvalidSpec"
    marks = {"Ready": "False", "Reconciling": "False", "Stalled": "True"}
    for item in status["conditions"]:
        if item["type"] in marks:
            item |= {"status": marks[item["type"]], "reason": "InvalidSpec", "message": "spec.later: no such field"}
    return document


def by_the_release_after(state: str) -> Raw:
    """The same with what only the release after knows."""
    document = recorded(state)
    spec, status = document["run"]["spec"], document["run"]["status"]
    spec["training"][NEW_FIELD] = 60
    status |= {"version": 3, "fabric": "healthy", "trainer": {"image": "trainer:after", "runVersion": 3, "arch": "x"}}
    status["conditions"].append(
        {"type": "FabricHealthy", "status": "True", "reason": "LinksUp", "lastTransitionTime": now()}
    )
    if status["phase"] == "Running":
        status["phase"] = NEW_PHASE
    if status["phase"] == "Failed":
        status["failures"][0]["class"] = NEW_CLASS
    return document


WRITERS: dict[str, Callable[[str], Raw]] = {
    "before": by_the_release_before,
    "before, and it marked the run": marked_by_the_release_before,
    "after": by_the_release_after,
}
UNDER_WAY = {"Ready": "False", "Reconciling": "True", "Stalled": "False"}
HEALTHY = {  # what kstatus is to read in the end
    "finished": {"Ready": "True", "Reconciling": "False", "Stalled": "False"},
    "failed": {"Ready": "False", "Reconciling": "False", "Stalled": "True"},
    "running": UNDER_WAY,
    "queued": UNDER_WAY,
    "suspended": UNDER_WAY,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_run_goes_on_from_where_another_release_left_it(writer: str, state: str) -> None:
    document = WRITERS[writer](state)
    raw, old = document["run"], copy.deepcopy(document["run"]["status"])
    reading = parse_run(raw)
    assert reading.left_out == ((f"spec.training.{NEW_FIELD}",) if writer == "after" else ())
    jobs, pods = map(parse_job, document["jobs"]), map(parse_pod, document["pods"])
    observed = seen(reading.value, *jobs, *pods)
    settings = resolve(reading.value, SETTINGS)
    at = datetime.fromisoformat(old["conditions"][0]["lastTransitionTime"]) + timedelta(seconds=5)

    plan = decide(observed, at, settings)
    assert (plan.actions, plan.failure, plan.ended) == ((), None, False)

    trainer = choose_trainer(observed, settings, SETTINGS.trainer_image)
    new = compute_status(reading.value, plan, Reports(), at, keep_trainer(observed, plan, trainer)).to_wire()
    kept = ("attempt", "adapter", "failures", "startTime", "completionTime", "pins", "suspendedAttempt", "fabric")
    assert {name: new.get(name) for name in kept} == {name: old.get(name) for name in kept}
    conditions = {item["type"]: item["status"] for item in new["conditions"]}
    assert conditions == {item["type"]: item["status"] for item in old["conditions"]} | HEALTHY[state]
    assert "InvalidSpec" not in json.dumps(new)
    if writer == "after":
        assert (new["version"], new["trainer"]) == (3, old["trainer"]), "what the newer one has on record is kept"
    elif state == "suspended":
        assert new.get("trainer") is None, "its Job is gone, so nobody knows"
    elif state in ("running", "queued"):
        assert new["trainer"] == {"image": "trainer:before", "runVersion": 1}
        assert new["version"] == STATUS_VERSION
    elif writer == "before":
        assert new == {**old, "version": 1}, "a run that has ended is not even written to"


@pytest.mark.parametrize("state", STATES)
def test_a_value_of_a_newer_release_leaves_the_status_to_itself(state: str) -> None:
    document = recorded(state)
    document["run"]["spec"]["training"]["objective"] = "orpo"
    with pytest.raises(InvalidRunError, match=r"spec\.training\.objective") as raised:
        parse_run(document["run"])
    assert raised.value.status is not None
    want = document["run"]["status"]
    assert raised.value.status.to_wire() == {**want, "version": 1}
