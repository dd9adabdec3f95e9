"""Whether an object with the name of a child is the run's own."""

from typing import Any

import pytest

from lora_operator.kube.ownership import find_conflict
from lora_operator.names import ATTEMPT_LABEL, RUN_LABEL
from tests.unit.operator.builders import a_run

LABELS = {RUN_LABEL: "tickets", ATTEMPT_LABEL: "1"}
JOB = {"kind": "Job", "metadata": {"name": "tickets-1", "labels": LABELS}}
SERVICE = {"kind": "Service", "metadata": {"name": "tickets-1", "labels": LABELS}}


def owned(kind: str = "LoRAFineTune", name: str = "tickets", uid: str = "run-uid") -> dict[str, Any]:
    return {"ownerReferences": [{"kind": kind, "name": name, "uid": uid, "controller": True}]}


OTHER_LABELS = (
    "Job tickets-1 exists already and was not made by the operator, though it names the run as its owner: its label "
    f"{ATTEMPT_LABEL} is not there"
)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None, bool]] = {
    "its own": (JOB, {**owned(), "labels": LABELS}, None, False),
    "a Job that the watches would not show": (JOB, {**owned(), "labels": {RUN_LABEL: "tickets"}}, OTHER_LABELS, False),
    "a Service needs no labels": (SERVICE, owned(), None, False),
    "its own, which goes": (
        JOB, {**owned(), "labels": LABELS, "deletionTimestamp": "2026-01-01T00:00:00Z"},
        "Job tickets-1 exists already and belongs to LoRAFineTune tickets", True,
    ),
    "that of an earlier run of the name": (
        JOB, owned(uid="earlier"), "Job tickets-1 exists already and belongs to LoRAFineTune tickets", True
    ),
    "that of another run": (
        JOB, owned(name="other", uid="other"), "Job tickets-1 exists already and belongs to LoRAFineTune other", False
    ),
    "nobody's": (JOB, {}, "Job tickets-1 exists already and belongs to no LoRAFineTune", False),
    "nobody's, which goes": (
        JOB, {"deletionTimestamp": "2026-01-01T00:00:00Z"},
        "Job tickets-1 exists already and belongs to no LoRAFineTune", True,
    ),
    "another controller's": (
        JOB, owned("CronJob", "tickets", "cron"), "Job tickets-1 exists already and belongs to CronJob tickets", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whose_an_object_is(case: str) -> None:
    child, metadata, message, passing = CASES[case]
    found = find_conflict(child, {"metadata": {"name": "tickets-1", **metadata}}, a_run())
    assert (found and (found.message, found.passing)) == (message and (message, passing))
