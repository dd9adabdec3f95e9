"""The trainer that a run began with, and keeps."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lora_api import RUN_VERSION, TrainerPin
from lora_api.preflight import PreflightOutcome
from lora_operator.children.assembly import build_children
from lora_operator.children.controlkeys import draw_control_key
from lora_operator.names import RUN_ANNOTATION, RUN_VERSION_ANNOTATION
from lora_operator.settings import Settings
from lora_operator.state.plan import LaunchAttempt, LaunchPreflight, Plan
from lora_operator.state.trainers import choose_trainer, describe_unknown, keep_trainer
from lora_operator.watched.views import JobView, parse_job
from tests.unit.operator.builders import a_job, a_preflight, a_run, failure, seen

OWN = "trainer:2"
SETTINGS = Settings(trainer_image=OWN)
OLD = TrainerPin(image="trainer:1", run_version=1)
NEW = TrainerPin(image=OWN, run_version=RUN_VERSION)
OF_RUNTIME = TrainerPin(image="of/runtime:1", run_version=1)
KEY = "0f" * 32


@dataclass(frozen=True)
class Case:
    want: TrainerPin
    status: dict[str, Any] = field(default_factory=dict)
    jobs: tuple[JobView, ...] = ()
    image: str = OWN
    plan: Plan = field(default_factory=Plan)
    kept: TrainerPin | None = None


CASES = {
    "a new run gets that of the operator": Case(NEW),
    "and keeps it once it has pods": Case(NEW, plan=Plan(actions=(LaunchAttempt(1),)), kept=NEW),
    "the preflight's pods are the first": Case(NEW, plan=Plan(actions=(LaunchPreflight(1),)), kept=NEW),
    "an image of a runtime may be old": Case(
        OF_RUNTIME, image="of/runtime:1", plan=Plan(actions=(LaunchAttempt(1),)), kept=OF_RUNTIME
    ),
    "until its preflight says what it reads": Case(
        OF_RUNTIME,
        image="of/runtime:1",
        jobs=(a_preflight(image="of/runtime:1"),),
        plan=Plan(passed=PreflightOutcome(run_version=2)),
        kept=TrainerPin(image="of/runtime:1", run_version=2),
    ),
    "a trainer that does not say reads version 1": Case(
        NEW, {"trainer": NEW.to_wire()}, plan=Plan(passed=PreflightOutcome()), kept=TrainerPin(image=OWN, run_version=1)
    ),
    "what is on record counts": Case(OLD, {"attempt": 1, "trainer": OLD.to_wire()}, (a_job(image=OWN),), kept=OLD),
    "without a record the newest Job's": Case(
        OLD, {"attempt": 2}, (a_job(1, image="trainer:0"), a_job(2, image="trainer:1")), kept=OLD
    ),
    "a Job says what its operator knew": Case(NEW, {}, (a_job(image=OWN, run_version=2),), kept=NEW),
    "a preflight's Job is one too": Case(OLD, {}, (a_preflight(image="trainer:1"),), kept=OLD),
    "without a Job the operator's": Case(
        NEW, {"attempt": 1, "failures": [failure(1)]}, plan=Plan(actions=(LaunchAttempt(2),)), kept=NEW
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_which_trainer_a_run_has(case: str) -> None:
    row = CASES[case]
    observed = seen(a_run(status=row.status), *row.jobs)
    trainer = choose_trainer(observed, replace(SETTINGS, trainer_image=row.image), OWN)
    assert trainer == row.want
    assert keep_trainer(observed, row.plan, trainer) == row.kept


def test_it_is_said_where_an_attempt_may_get_another_trainer_than_those_before() -> None:
    status = {"attempt": 1, "failures": [failure(1)]}
    lost = seen(a_run(status=status))
    assert "that of attempt 1 is not on record" in describe_unknown(lost, Plan(actions=(LaunchAttempt(2),)), NEW)
    for quiet, plan in (
        (lost, Plan()),
        (seen(a_run()), Plan(actions=(LaunchAttempt(1),))),
        (seen(a_run(status=status), a_job(image="trainer:1")), Plan(actions=(LaunchAttempt(2),))),
        (seen(a_run(status={**status, "trainer": OLD.to_wire()})), Plan(actions=(LaunchAttempt(2),))),
    ):
        assert describe_unknown(quiet, plan, NEW) == ""


def test_the_pods_have_the_runs_trainer_and_the_document_that_it_reads() -> None:
    for trainer, version, annotations in ((OLD, 1, None), (NEW, 2, {RUN_VERSION_ANNOTATION: "2"})):
        (policy, service), (job,) = build_children(a_run(), LaunchAttempt(3), SETTINGS, trainer, KEY)
        assert (policy["kind"], service["kind"]) == ("NetworkPolicy", "Service")
        assert job["spec"]["template"]["spec"]["containers"][0]["image"] == trainer.image
        assert job["metadata"].get("annotations") == annotations
        document = job["spec"]["template"]["metadata"]["annotations"][RUN_ANNOTATION]
        assert f'"version":{version}' in document
        assert (KEY in document) is (version == 2)


def test_a_preflight_has_no_key() -> None:
    (policy,), (job,) = build_children(a_run(), LaunchPreflight(1), SETTINGS, NEW, KEY)
    document = job["spec"]["template"]["metadata"]["annotations"][RUN_ANNOTATION]
    assert (policy["kind"], KEY in document) == ("NetworkPolicy", False)
    assert '"version":1' in document, "there is nothing new in it: any trainer may check it"
    assert job["metadata"]["annotations"] == {RUN_VERSION_ANNOTATION: "2"}


def test_a_job_is_read_back_as_it_was_made() -> None:
    _, (job,) = build_children(a_run(), LaunchAttempt(1), SETTINGS, NEW, KEY)
    job["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    job["spec"]["template"]["spec"]["containers"].insert(0, {"name": "sidecar", "image": "of/others"})
    view = parse_job(job)
    assert (view.image, view.run_version) == (OWN, 2)


def test_no_two_attempts_have_the_same_key() -> None:
    keys = {draw_control_key() for _ in range(3)}
    assert [len(bytes.fromhex(key)) for key in keys] == [32] * 3
