"""The pure parts of the soak: what the players do, and what counts as wrong."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bench.scale.audit import Call
from bench.scale.client import BenchError
from bench.scale.proxy import Trouble
from bench.soak import containers
from bench.soak.checks import (
    Found,
    Trainer,
    find_growth,
    find_leftovers,
    find_orphans,
    find_wrong_ends,
    find_wrong_events,
    find_wrong_jobs,
    find_wrong_trainers,
)
from bench.soak.nodes import BAD_NODES, NODES, choose_node
from bench.soak.operators import Sample, find_first_look
from bench.soak.player import Seen, compute_log, decide_actions
from bench.soak.stories import Story
from lora_operator.status.progress import parse_progress
from tests.support.runs import ended, running, waiting
from tests.unit.bench.told import tell

Raw = dict[str, Any]
NOW = datetime.now(UTC)
BEFORE = (NOW - timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_troubles_of_the_proxy_share_the_requests() -> None:
    trouble = Trouble(refused=0.1, late=0.2, unavailable=0.3, lost=0.1)
    drawn = [trouble.draw(number / 100 + 0.001) for number in range(100)]
    assert Counter(drawn) == {"refused": 10, "late": 20, "unavailable": 30, "lost": 10, "passed": 30}


def pod(
    index: int, status: Raw, *, attempt: int = 1, node: str = "node-0", grace: int | None = None, suffix: str = "x"
) -> Raw:
    metadata: Raw = {
        "name": f"run-0-{attempt}-{index}-{suffix}",
        "finalizers": ["batch.kubernetes.io/job-tracking"],
        "namespace": "team",
        "creationTimestamp": BEFORE,
        "uid": f"pod-{attempt}-{index}",
        "labels": {
            "lorafinetune.io/name": "run-0",
            "lorafinetune.io/attempt": str(attempt),
            "batch.kubernetes.io/job-completion-index": str(index),
        },
    }
    if grace is not None:
        metadata |= {"deletionTimestamp": BEFORE, "deletionGracePeriodSeconds": grace}
    return {"kind": "Pod", "metadata": metadata, "spec": {"nodeName": node} if node else {}, "status": status}


def since_long() -> Raw:
    status = running()
    status["containerStatuses"][0]["state"]["running"]["startedAt"] = BEFORE
    return status


def see(*pods: Raw, suspend: bool = False, **status: Any) -> Seen:
    run = {
        "kind": "LoRAFineTune",
        "metadata": {"name": "run-0", "namespace": "team", "uid": "u"},
        "spec": {"runPolicy": {"suspend": suspend}},
        "status": {"attempt": 1, **status},
    }
    return Seen(run, pods=pods)


def play(story: Story, seen: Seen) -> list[str]:
    """The actions, each as its method, the last parts of its path, and what it says of a pod."""
    told = []
    for action in decide_actions(story, seen, NOW):
        status = action.body.get("status", {})
        state = (status.get("containerStatuses") or [{"state": {}}])[0]["state"]
        code = state.get("terminated", {}).get("exitCode", next(iter(state), status.get("phase", "")))
        told.append(f"{action.method} {action.path.split('/team/')[1]} {code}".strip())
    return told


NEW: Raw = {"phase": "Pending"}
POD_0, POD_1 = "pods/run-0-1-0-x", "pods/run-0-1-1-x"
SET_0, SET_1 = f"PATCH {POD_0}/status", f"PATCH {POD_1}/status"


STEPS: dict[str, tuple[Story, Seen, list[str]]] = {
    "a new pod gets a node": (tell("succeeds"), see(pod(0, NEW, node="")), [f"POST {POD_0}/binding"]),
    "a pod with a node starts": (tell("succeeds"), see(pod(0, NEW)), [f"{SET_0} running"]),
    "but not without an image": (tell("no image"), see(pod(0, NEW)), [f"{SET_0} waiting"]),
    "for which it waits": (tell("no image"), see(pod(0, waiting("ErrImagePull", "manifest unknown"))), []),
    "a gang that has run for long enough succeeds": (
        tell("succeeds", runs_for=30.0),
        see(pod(0, since_long()), pod(1, since_long())),
        [f"{SET_0} 0", f"{SET_1} 0"],
    ),
    "not before": (tell("succeeds", runs_for=90.0), see(pod(0, since_long()), pod(1, since_long())), []),
    "a gang that stalls runs on": (tell("stalls"), see(pod(0, since_long()), pod(1, since_long())), []),
    "and one whose progress was not told": (
        tell("evicted", "succeeds once its progress was told"),
        see(pod(0, since_long(), attempt=2), pod(1, since_long(), attempt=2), attempt=2, progress={"step": 1007}),
        [],
    ),
    "which succeeds once it was": (
        tell("evicted", "succeeds once its progress was told"),
        see(pod(0, since_long(), attempt=2), pod(1, since_long(), attempt=2), attempt=2, progress={"step": 2007}),
        ["PATCH pods/run-0-2-0-x/status 0", "PATCH pods/run-0-2-1-x/status 0"],
    ),
    "one rank fails first": (tell("BadData"), see(pod(0, since_long()), pod(1, since_long())), [f"{SET_1} 65"]),
    "a node rejects its pod": (tell("rejected by a node"), see(pod(1, NEW, node="bad-0")), [f"{SET_1} Failed"]),
    "and the peer loses it": (
        tell("rejected by a node"),
        see(pod(0, since_long()), pod(1, {"phase": "Failed"}, node="bad-0")),
        [f"{SET_0} 73"],
    ),
    "and its peer loses it": (
        tell("BadData"),
        see(pod(0, since_long()), pod(1, ended(65))),
        [f"{SET_0} 73"],
    ),
    "the kernel ends a pod": (
        tell("out of host memory"),
        see(pod(0, since_long()), pod(1, since_long())),
        [f"{SET_1} 137"],
    ),
    "a lost node says nothing": (
        tell("node lost"),
        see(pod(0, ended(73)), pod(1, since_long())),
        [f"{SET_1} Failed"],
    ),
    "and its pod is taken away": (
        tell("node lost"),
        see(pod(0, ended(73)), pod(1, {"phase": "Failed"})),
        [f"DELETE {POD_1}"],
    ),
    "a pod that is asked to stop takes its gang along": (
        tell("succeeds"),
        see(pod(0, since_long(), grace=120), pod(1, since_long())),
        [f"{SET_0} 75", f"{SET_1} 75"],
    ),
    "and goes": (tell("succeeds"), see(pod(0, ended(75), grace=120), pod(1, ended(75))), [f"DELETE {POD_0}"]),
    "once": (tell("succeeds"), see(pod(0, ended(75), grace=0), pod(1, ended(75))), []),
    "a pod that was made twice goes alone": (
        tell("succeeds", runs_for=90.0),
        see(pod(0, since_long()), pod(0, since_long(), grace=120, suffix="y"), pod(1, since_long())),
        ["PATCH pods/run-0-1-0-y/status 75"],
    ),
    "a user suspends": (
        tell("suspended", "succeeds"),
        see(pod(0, since_long()), pod(1, since_long())),
        ["PATCH lorafinetunes/run-0"],
    ),
    "once for each attempt": (
        tell("suspended", "succeeds"),
        see(pod(0, since_long()), pod(1, since_long()), suspendedAttempt=1),
        [],
    ),
    "and resumes": (
        tell("suspended", "succeeds"),
        see(suspend=True, phase="Suspended", reason="Suspended"),
        ["PATCH lorafinetunes/run-0"],
    ),
    "but not while pods end": (
        tell("suspended", "succeeds"),
        see(suspend=True, phase="Suspended", reason="Suspending"),
        [],
    ),
    "a user deletes the Job": (
        tell("Job deleted", "succeeds"),
        see(pod(0, since_long()), pod(1, since_long())),
        ["DELETE jobs/run-0-1"],
    ),
    "an attempt that no story has runs on": (
        tell("succeeds"),
        see(pod(0, since_long(), attempt=2), pod(1, since_long(), attempt=2), attempt=2),
        [],
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_the_players_take_the_next_step(case: str) -> None:
    story, seen, want = STEPS[case]
    assert play(story, seen) == want


def over() -> Raw:
    status = ended(65)
    status["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = NOW.strftime("%Y-%m-%dT%H:%M:%SZ")
    return status


LOGS: dict[str, tuple[Story, Raw, list[int]]] = {
    "a step each second": (tell("succeeds"), pod(0, since_long()), list(range(1050, 1061))),
    "of an attempt of its own": (tell("evicted", "BadData"), pod(0, since_long(), attempt=2), list(range(2050, 2061))),
    "none before the start": (tell("succeeds"), pod(0, waiting("ContainerCreating", "")), []),
    "none from another rank": (tell("succeeds"), pod(1, since_long()), []),
    "none once it stalls": (
        tell("stalls", pause=2.0, runs_for=3.0),
        pod(0, since_long()),
        [1001, 1002, 1003, 1004, 1005],
    ),
    "as many when it has ended": (tell("BadData"), pod(0, over()), list(range(1050, 1061))),
}


@pytest.mark.parametrize("case", LOGS)
def test_rank_zero_tells_of_its_steps(case: str) -> None:
    story, item, want = LOGS[case]
    assert [line.step for line in parse_progress(compute_log(story, item, NOW))] == want


def item(kind: str, name: str, owner: str = "", **metadata: Any) -> Raw:
    owners = [{"kind": "LoRAFineTune", "name": "run-0", "uid": owner}] if owner else []
    labels = {"lorafinetune.io/name": "run-0"}
    metadata = {"name": name, "namespace": "team", "uid": name, "labels": labels, "ownerReferences": owners, **metadata}
    return {"kind": kind, "metadata": metadata, "status": {"phase": "Failed"}}


def run_with(**status: Any) -> Raw:
    conditions = [{"type": "Failed" if status.get("phase") == "Failed" else "Complete", "status": "True"}]
    return {**item("LoRAFineTune", "run-0"), "status": {"attempt": 1, "conditions": conditions, **status}}


def test_a_run_in_another_state_is_wrong() -> None:
    story = tell("BadData")
    right = run_with(phase="Failed", failures=[{"class": "BadData"}])
    assert find_wrong_ends([story], Found([right])) == []
    wrongs = {
        "phase is Running": run_with(phase="Running"),
        "attempt is 2": run_with(phase="Failed", attempt=2, failures=[{"class": "BadData"}]),
        "charged restarts is 1": run_with(phase="Failed", chargedRestarts=1, failures=[{"class": "BadData"}]),
        "failures are []": run_with(phase="Failed"),
        "failures are ['Internal']": run_with(phase="Failed", failures=[{"class": "Internal"}]),
    }
    for what, run in wrongs.items():
        assert what in find_wrong_ends([story], Found([run]))[0]
    told = tell("succeeds once its progress was told")
    ended_well = run_with(phase="Succeeded", adapter={}, progress={"percent": 100})
    assert find_wrong_ends([told], Found([ended_well])) == []
    assert "progress is None" in find_wrong_ends([told], Found([ended_well | {"status": {}}]))[0]
    assert "is gone" in find_wrong_ends([story], Found())[0]
    assert find_wrong_ends([tell("run deleted")], Found()) == []
    assert "is there" in find_wrong_ends([tell("run deleted")], Found([right]))[0]


def test_orphans_and_leftovers_are_found() -> None:
    run = run_with(phase="Succeeded")
    job = item("Job", "run-0-1", "run-0")
    assert find_orphans(Found([run], [job], [item("Pod", "p", "run-0-1")])) == []
    assert "which is gone" in find_orphans(Found([run], [], [item("Pod", "p", "run-0-1")]))[0]
    assert "being deleted" in find_orphans(Found([run], [item("Job", "j", "run-0", deletionTimestamp=BEFORE)]))[0]
    cleared = tell("succeeds", policy={"ttlSecondsAfterFinished": 1})
    assert find_leftovers([tell("succeeds")], Found([run], [job])) == []
    assert find_leftovers([cleared], Found([run], [job])) == ["Job team/run-0-1 is still there"]
    old = item("Job", "run-0-1", "run-0")
    assert find_leftovers([tell("evicted", "succeeds")], Found([run], [old])) == ["Job team/run-0-1 is still there"]
    assert find_leftovers([tell("succeeds")], Found([run], pods=[pod(0, since_long())])) == [
        "Pod team/run-0-1-0-x runs on"
    ]


def made(name: str, code: int = 201) -> Call:
    return Call(0.0, 0.0, "lora-operator", "agent", "create", "jobs", "team", name, code)


def test_jobs_and_events_too_many_are_found() -> None:
    told = [tell("evicted", "succeeds")]
    assert find_wrong_jobs(told, [made("run-0-1"), made("run-0-1", 409), made("run-0-2")]) == []
    assert find_wrong_jobs(told, [made("run-0-1"), made("run-0-1")]) == ["Job run-0-1 was made 2 times"]
    assert len(find_wrong_jobs(told, [made("run-0-3")])) == 1
    deleted = [tell("crashes", "run deleted")]
    assert find_wrong_jobs(deleted, [made("run-0-1"), made("run-0-2"), made("run-0-2")]) == []
    assert len(find_wrong_jobs(deleted, [made("run-0-1"), made("run-0-1"), made("run-0-2")])) == 1
    assert len(find_wrong_jobs(deleted, [made("run-0-2")] * 3)) == 1

    def event(name: str, reason: str, action: str = "Launch") -> Raw:
        return {"metadata": {"name": name}, "regarding": {"name": "run-0"}, "reason": reason, "action": action}

    events = [event("run-0.u.1.started", "Started"), event("run-0.u.2.started", "Started")]
    events.append(event("run-0.u.2.succeeded", "Succeeded", "Publish"))
    assert find_wrong_events(told, events) == []
    assert len(find_wrong_events(told, [*events, event("run-0.u.3.started", "Started")])) == 1
    assert len(find_wrong_events(told, [*events, event("run-0.v.2.started", "Started")])) == 1
    assert len(find_wrong_events(told, [*events, event("run-0.u.2.baddata", "BadData", "Fail")])) == 1


def test_memory_counts_once_a_process_has_worked() -> None:
    young = [Sample(float(at), 1, 30.0 + at, 0.1 * at) for at in range(31)]
    assert find_first_look(young, 5.0).at == 25.0, "it was warm later"
    assert find_first_look(young, 28.0).at == 28.0
    assert find_first_look(young[:10], 5.0).at == 9.0, "it never was"
    with pytest.raises(BenchError, match="not measured from 40 s"):
        find_first_look(young, 40.0)


def test_growth_counts_beyond_what_more_runs_take() -> None:
    assert find_growth(80.0, 84.0, 100, 15.0, 3.0) == []
    assert "85.0" in find_growth(80.0, 85.0, 100, 15.0, 3.0)[0]


def test_the_scheduler_likes_bad_nodes_and_keeps_to_the_affinity() -> None:
    def avoiding(*names: str) -> Raw:
        rule = {"key": "metadata.name", "operator": "NotIn", "values": list(names)}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [rule]}]}}
        return {"metadata": {"name": "p"}, "spec": {"affinity": {"nodeAffinity": required}}}

    free: Raw = {"metadata": {"name": "p"}, "spec": {}}
    assert [choose_node(free, 0, 0), choose_node(free, 1, 0), choose_node(free, 1, 2)] == ["node-0", "node-1", "bad-0"]
    assert choose_node(avoiding("bad-0"), 1, 1) == "node-1"
    assert choose_node(avoiding("bad-0"), 1, 2) == "bad-1"
    assert choose_node(avoiding("bad-0", "bad-1", "node-1"), 1, 2) == "node-2"
    with pytest.raises(ValueError, match="takes no node"):
        choose_node(avoiding(*BAD_NODES, *NODES), 1, 2)


def with_sidecar(kind: str, status: Raw, **more: Any) -> Raw:
    one = pod(1, status, **more)
    one["spec"] |= {"containers": [{"name": "trainer", "securityContext": {}}]}
    for change in containers.inject(one, kind):
        name = change["path"].split("/")[2]
        one["spec"][name] = change["value"] if name == "initContainers" else [change["value"], *one["spec"][name]]
    return one


def test_an_ordinary_sidecar_keeps_its_pod_alive_until_it_is_asked() -> None:
    running_on = containers.show_all(with_sidecar("sidecar", NEW), ended(70), asked=False)
    assert running_on["phase"] == "Running"
    one = with_sidecar("sidecar", running_on)
    assert containers.has_spoken(one)
    assert play(tell("Internal"), see(pod(0, ended(73)), one)) == []
    asked = with_sidecar("sidecar", running_on, grace=120)
    assert containers.compute_over(asked)["phase"] == "Failed"
    assert play(tell("Internal"), see(pod(0, ended(73)), asked)) == [f"{SET_1} 0"], "of the sidecar"


def test_a_native_sidecar_ends_with_its_pod() -> None:
    status = containers.show_all(with_sidecar("native sidecar", NEW), ended(0), asked=False)
    assert status["phase"] == "Succeeded"
    assert "terminated" in status["initContainerStatuses"][0]["state"]
    assert (
        "running"
        in containers.show_all(with_sidecar("native sidecar", NEW), running(), asked=False)["initContainerStatuses"][0][
            "state"
        ]
    )


def test_a_quota_is_raised_once_it_was_read() -> None:
    story = tell("succeeds", rule="quota")
    assert play(story, see(conditions=[{"type": "Scheduled", "reason": "PodsPending", "status": "False"}])) == []
    refused = [{"type": "Scheduled", "reason": "QuotaExceeded", "status": "False"}]
    [action] = decide_actions(story, see(conditions=refused), NOW)
    assert action.path.endswith("/team/resourcequotas/rule")


def test_trainers_that_change_without_a_word_or_cannot_read_are_found() -> None:
    reads = {"old": 1, "new": 2}
    same = [Trainer("run-0", 1, "old", 1), Trainer("run-0", 2, "old", 1), Trainer("run-1", 1, "new", 2)]
    assert find_wrong_trainers(same, reads, []) == []
    changed = [*same, Trainer("run-0", 3, "new", 2)]
    assert find_wrong_trainers(changed, reads, []) == ["run-0 had several trainers: new, old"]
    said = {"regarding": {"name": "run-0"}, "reason": "TrainerUnknown"}
    assert find_wrong_trainers(changed, reads, [said]) == []
    assert "too new for old" in find_wrong_trainers([Trainer("run-0", 1, "old", 2)], reads, [])[0]
