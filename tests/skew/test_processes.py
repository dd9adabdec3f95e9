"""Operators and CRDs of three releases on one API server: real processes take over from each other, both ways."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import devcluster
from lora_operator.names import RUN_ANNOTATION
from tests.controlplane.lifecycle.test_interruptions import jobs_created
from tests.skew.nextrelease import NEW_CLASS, NEW_FIELD, NEW_PHASE
from tests.skew.processes import Operator, running
from tests.skew.releases import Release
from tests.skew.story import PHASES, Facts, bring_about, look_at_all
from tests.support.api import Api
from tests.support.runs import Run, termination
from tests.support.versions import RATCHETING, knows
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

Install = Callable[[Release], None]
LogOf = Callable[[str], Path]

PAIRS = (
    ("today", "before"),
    ("today", "today"),
    ("after", "today"),
    ("after", "after"),
    ("today", "after"),
    ("before", "today"),
    ("today", "today"),
)
"""Operator and CRDs, in the order in which they take over: upgrades one at a time, and all the way back."""


def test_operators_and_crds_of_any_two_releases_leave_every_run_as_it_is(
    cp: devcluster.ControlPlane, api: Api, namespace: str, install: Install, log_of: LogOf,
    before: Release, today: Release, after: Release,
) -> None:  # fmt: skip
    releases = {release.name: release for release in (before, today, after)}
    install(before)
    with running(before, cp.kubeconfig, namespace, log_of("start")):
        runs = bring_about(api, namespace)
    facts = {name: Facts.of(run) for name, run in runs.items()}
    for number, (operator, crds) in enumerate(PAIRS):
        pair = f"{number}: operator of {operator}, CRDs of {crds}"
        install(releases[crds])
        with running(releases[operator], cp.kubeconfig, namespace, log_of(str(number))) as process:
            eventually(f"the CRDs of {crds} are what is served", lambda crds=crds: shows_crds(runs["running"], crds))
            look_at_all(runs, process)
            for name, run in runs.items():
                phase = NEW_PHASE if (name, operator) == ("running", "after") else PHASES[name]
                run.wait(f"{phase} with {pair}", lambda status, phase=phase: status.get("phase") == phase, 20)
                assert Facts.of(run) == facts[name], pair
                assert run.status["reason"] != "InvalidSpec", pair
            check_versions(runs["running"], operator, crds, process)
    spoil(runs, before, after, cp.kubeconfig, namespace, log_of("spoil"), install)
    with running(today, cp.kubeconfig, namespace, log_of("heal")) as process:
        look_at_all(runs, process)
        for name, run in runs.items():
            run.wait("it is healed", lambda status: status["reason"] != "InvalidSpec", 20)
            assert Facts.of(run) == facts[name], "healed"
    finish(runs, today, cp.kubeconfig, namespace, log_of("end"))
    made = [f"{name}-{attempt}" for name in runs for attempt in (1, 2) if (name, attempt) in TRAINED]
    assert jobs_created(cp, namespace) == sorted(made)


TRAINED = {("finished", 1), ("running", 1), ("running", 2), ("queued", 1), ("suspended", 1), ("suspended", 2),
           ("failed", 1)}  # fmt: skip
"""All that was ever started, over all operators: nothing twice."""


def shows_crds(run: Run, crds: str) -> bool:
    return (NEW_FIELD in run.raw["spec"]["training"]) is (crds == "after")


def check_versions(run: Run, operator: str, crds: str, process: Operator) -> None:
    """What is on record of a run that goes on, in the words of those who know it."""
    status = run.status
    if operator == "today" and crds == "before":
        assert "status.trainer" in process.log, "what the CRD is too old for is said"
        assert "trainer" not in status
    elif operator != "before":
        assert status["trainer"] == {"image": "trainer:before", "runVersion": 1}
    if operator == "after":
        assert (status["fabric"], status["version"]) == ("healthy", 3)
    if operator == "today" and crds == "after":
        assert (status["fabric"], status["version"]) == ("healthy", 3), "what a newer operator wrote is kept"
        assert f"spec.training.{NEW_FIELD}" in process.log, "what is left out is said"


def spoil(
    runs: dict[str, Run], before: Release, after: Release, kubeconfig: Path, namespace: str, log: Path, install: Install
) -> None:
    """What the release before did where the CRDs were a field ahead: it marked every run, those that had ended too."""
    install(after)
    with running(before, kubeconfig, namespace, log):
        for run in runs.values():
            run.wait("it is marked", lambda status: status["reason"] == "InvalidSpec", 60)
        assert runs["finished"].condition("Stalled")["status"] == "True"
        assert runs["finished"].condition("Complete")["status"] == "True"


def finish(runs: dict[str, Run], release: Release, kubeconfig: Path, namespace: str, log: Path) -> None:
    """What waited goes on, with the trainer that it had, and comes to its end."""
    with running(release, kubeconfig, namespace, log):
        runs["running"].set_failed(1, "StoreUnavailable", 74, "503 Slow Down")
        suspended = runs["suspended"]
        suspended.api.patch(f"{suspended.path}/suspended", {"spec": {"runPolicy": {"suspend": False}}})
        for name in ("running", "suspended"):
            runs[name].set_running(2)
            runs[name].wait("attempt 2", lambda status: status.get("attempt") == 2 and status["phase"] == "Running")
        (job,) = (job for job in runs["running"].jobs() if job["metadata"]["name"] == "running-2")
        assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "trainer:before"
        check_document(runs["running"], 2)
        events = [event["reason"] for event in suspended.events()]
        assert "TrainerUnknown" in events, "the one whose Job was gone gets another trainer, and that is said"
        for name in ("running", "suspended"):
            runs[name].set_succeeded(2)
            runs[name].wait_phase("Succeeded")


def check_document(run: Run, attempt: int) -> None:
    """The trainer of the release before reads what its next attempt is given."""
    document = run.document(attempt)
    assert (document["version"], "controlKey" in document) == (1, False)


def test_a_failure_that_only_the_newer_release_knows_outlives_a_rollback(
    cp: devcluster.ControlPlane, api: Api, namespace: str, install: Install, log_of: LogOf,
    today: Release, after: Release,
) -> None:  # fmt: skip
    """The newer operator is there before its CRDs, then with them, and then neither is."""
    early, late = Run(api, namespace, "early"), Run(api, namespace, "late")
    words = termination(NEW_CLASS, "links of the fabric are down", rank=0)
    for run, crds in ((early, today), (late, after)):
        install(crds)
        with running(after, cp.kubeconfig, namespace, log_of(f"after-{run.name}")):
            run.create()
            run.set_running(1)
            run.set_ended(1, 1, 73, termination("PeerLost", "Connection closed by peer", rank=1))
            run.set_ended(1, 0, 79, words)
            run.set_running(2)
            run.wait("attempt 2", lambda status: status.get("attempt") == 2 and status["phase"] == NEW_PHASE)
    (failure,) = early.status["failures"]
    assert failure["class"] == "Internal", "a word that the CRD takes"
    assert failure["message"].startswith(f"{NEW_CLASS}: links of the fabric are down")
    assert late.status["failures"][0]["class"] == NEW_CLASS
    for crds in (after, today):
        install(crds)
        with running(today, cp.kubeconfig, namespace, log_of(f"back-{crds.name}")) as operator:
            # Where a write is judged as a whole, what has the newer CRD's word cannot be written under today's.
            written = (early, late) if crds is after or knows(RATCHETING) else (early,)
            look_at_all({run.name: run for run in written}, operator)
            for run in written:
                status = run.wait("it runs", lambda status: status["phase"] == "Running")
                assert (status["attempt"], len(status["failures"])) == (2, 1)
                assert NEW_CLASS in json.dumps(status["failures"])
            if crds is today:
                for run in written:
                    run.set_succeeded(2)
                    assert run.wait_phase("Succeeded")["adapter"]
    assert jobs_created(cp, namespace) == ["early-1", "early-2", "late-1", "late-2"]


def test_an_attempt_outlives_the_operator_that_launched_it_and_all_is_cleared_up(
    cp: devcluster.ControlPlane, api: Api, namespace: str, install: Install, log_of: LogOf,
    before: Release, today: Release,
) -> None:  # fmt: skip
    """The release before gives pods a ConfigMap, and each attempt a Service of its own; today's gives neither."""
    install(today)
    old, new = Run(api, namespace, "old"), Run(api, namespace, "new")
    with running(before, cp.kubeconfig, namespace, log_of("before")):
        old.create()
        old.set_running(1)
        old.wait_phase("Running")
        kept = old.services() + old.configmaps()
    with running(today, cp.kubeconfig, namespace, log_of("today")) as operator:
        look_at_all({"old": old}, operator)
        assert old.services() + old.configmaps() == kept, "what its pods need is as it was"
        new.create()
        new.set_running(1)
        new.wait_phase("Running")
        old.set_failed(1, "StoreUnavailable", 74)
        old.set_running(2)
        old.wait("attempt 2", lambda status: status.get("attempt") == 2 and status["phase"] == "Running")
        assert [item["metadata"]["name"] for item in old.services()] == ["old-1", "old-gang"]
        assert [item["metadata"]["name"] for item in old.configmaps()] == ["old-1"]
    with running(before, cp.kubeconfig, namespace, log_of("back")) as operator:
        look_at_all({"old": old, "new": new}, operator)
        new.set_failed(1, "StoreUnavailable", 74)
        for run in (old, new):
            run.set_running(2)
            run.wait("attempt 2", lambda status: status.get("attempt") == 2 and status["phase"] == "Running")
    assert [item["metadata"]["name"] for item in new.configmaps()] == ["new-2"], "the release before made attempt 2"
    with running(today, cp.kubeconfig, namespace, log_of("again")):
        for run in (old, new):
            run.set_succeeded(2)
            run.wait_phase("Succeeded")
            run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 0}}})
            run.wait("it is cleared up", lambda _, run=run: run.condition("CleanedUp"))
            assert (run.jobs(), run.services(), run.configmaps()) == ([], [], []), "whoever made it"
    assert jobs_created(cp, namespace) == ["new-1", "new-2", "old-1", "old-2"]


def test_the_key_of_a_gang_is_told_to_its_pods_and_nobody_else(
    cp: devcluster.ControlPlane, api: Api, namespace: str, install: Install, log_of: LogOf, today: Release
) -> None:
    install(today)
    run = Run(api, namespace, "keyed").create()
    with running(today, cp.kubeconfig, namespace, log_of("today"), "--log-level=debug") as operator:
        run.set_running(1)
        documents = [run.document(1)]
        run.set_failed(1, "StoreUnavailable", 74)
        run.set_running(2)
        run.wait("attempt 2", lambda status: status.get("attempt") == 2 and status["phase"] == "Running")
        documents.append(run.document(2))
        keys = {document["controlKey"] for document in documents}
        assert [document["version"] for document in documents] == [2, 2]
        told = [*run.jobs(), *run.pods(2)]
        templates = [item.get("spec", {}).get("template", item)["metadata"] for item in told]
        assert all(documents[1]["controlKey"] in each["annotations"].pop(RUN_ANNOTATION) for each in templates)
        elsewhere = json.dumps([run.raw, told, run.services(), run.events()]) + operator.log
    assert len(keys) == 2, "each attempt has its own"
    assert run.status["trainer"] == {"image": "trainer:today", "runVersion": 2}
    assert not any(key in elsewhere for key in keys)
