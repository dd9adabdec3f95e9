"""What scheduler, kubelets and users do about one run, by its story: from what there is to the next calls. All pure.

The Job controller and the garbage collector are real. Like them, the players look at what there is and need no memory,
so that a call which an API server that was killed has swallowed is made again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from bench.scale.client import JOBS, JSON, MERGE, PODS, RUNS, Raw
from bench.soak import containers, stories
from bench.soak.containers import find_trainer, has_spoken
from bench.soak.nodes import BAD_NODES, choose_node
from bench.soak.stories import Story
from lora_api import RULES, FailureClass, Phase, ProgressLine
from lora_operator.names import ATTEMPT_LABEL, INDEX_LABEL, PREFLIGHT_LABEL, RUN_LABEL, child_name
from lora_operator.objects import parse_time
from tests.support.runs import adapter_of, ended, running, settled, termination, waiting

GANG = 2
RULE = "rule"
"""Name of the ResourceQuota or LimitRange of a namespace."""

_UNTIL_ASKED = frozenset(
    {stories.SUSPENDED, stories.RUN_DELETED, stories.JOB_DELETED, stories.POD_DELETED, stories.OVERDUE, stories.STALLS}
)
"""Endings of pods that run until somebody asks them to stop."""

_NEVER_START = {
    stories.NO_IMAGE: ("ErrImagePull", "manifest unknown"),
    stories.NO_SECRET: ("CreateContainerConfigError", 'secret "store" not found'),
}

_NOTHING_NEW = 0
"""Step of the newest checkpoint. With a newer one each time, what is charged would depend on whose words are read."""
_STEPS = 1000
"""Steps of an attempt at most: no two attempts tell of the same one."""

REJECTION = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "Pod was rejected: no healthy devices"}

_LOG_LINES = 10

_NO_QUOTA = "QuotaExceeded"
"""What the status says of pods that a quota refuses: it is raised once somebody has read that."""
_ENOUGH_PODS = 20


@dataclass(frozen=True)
class Action:
    """A call to the API server."""

    method: str
    path: str
    body: Raw = field(default_factory=dict)
    content_type: str = JSON


@dataclass(frozen=True)
class Seen:
    """What there is of one run."""

    run: Raw | None
    jobs: Sequence[Raw] = ()
    pods: Sequence[Raw] = ()

    def gang(self, attempt: int, preflight: int = 0) -> list[Raw]:
        """The pods of an attempt or a preflight, rank by rank.

        The Job controller that does not see a pod of its own makes another one, and later takes one of the two away.
        """
        pods = [pod for pod in self.pods if number_of(pod) == (attempt, preflight)]
        pods.sort(key=lambda pod: (is_asked(pod), pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
        first = {index_of(pod): pod for pod in reversed(pods)}
        return [first[index] for index in sorted(first)]

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left to be played."""
        return (self.run is None or is_over(self.run)) and all(
            has_ended(pod) and not is_asked(pod) for pod in self.pods
        )


def is_over(run: Raw) -> bool:
    """Whether ``run`` has ended for good."""
    conditions = run.get("status", {}).get("conditions", [])
    return any(item["type"] in ("Complete", "Failed") and item["status"] == "True" for item in conditions)


def number_of(item: Raw) -> tuple[int, int]:
    """Attempt and preflight of a Job or pod; the one that it is not of is 0."""
    labels = item["metadata"].get("labels") or {}
    return int(labels.get(ATTEMPT_LABEL, 0)), int(labels.get(PREFLIGHT_LABEL, 0))


def index_of(pod: Raw) -> int:
    """The rank of a pod."""
    return int(pod["metadata"]["labels"][INDEX_LABEL])


def is_asked(pod: Raw) -> bool:
    """Whether ``pod`` was asked to stop."""
    return "deletionTimestamp" in pod["metadata"]


def has_ended(pod: Raw) -> bool:
    """Whether the containers of ``pod`` have ended."""
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def is_done(pod: Raw) -> bool:
    """Whether the trainer of ``pod`` has ended, whatever runs on beside it."""
    return has_ended(pod) or has_spoken(pod)


@dataclass(frozen=True)
class _Gang:
    """Pods that live and end together, all of an attempt or a preflight, and how the story says that they end."""

    pods: Sequence[Raw]
    size: int
    ending: str | None
    step: int
    """0: a preflight, which has none."""
    runs_for: float
    told: bool

    def say(self, failure_class: str, message: str, rank: int) -> str:
        """Last words of a pod."""
        where = {"step": self.step, "checkpointStep": _NOTHING_NEW} if self.step else {}
        return termination(failure_class, message, rank=rank, **where)

    def is_time(self, now: datetime) -> bool:
        """Whether all pods have run for as long as the story says."""
        if self.ending == stories.TOLD and not self.told:
            return False
        starts = [start for pod in self.pods if (start := _started(pod)) is not None]
        return len(starts) == self.size and (now - max(starts)).total_seconds() >= self.runs_for


def _find_gang(story: Story, number: tuple[int, int], seen: Seen) -> _Gang:
    attempt, preflight = number
    return _Gang(
        pods=seen.gang(attempt, preflight),
        size=1 if preflight else GANG,
        ending=story.ending(attempt, preflight),
        # Never the same step twice, but for a run that is stuck.
        step=7 if story.stuck and attempt else 10 * attempt,
        runs_for=story.runs_for,
        told=_progress(seen.run) > _STEPS * attempt,
    )


def decide_actions(story: Story, seen: Seen, now: datetime) -> list[Action]:
    """What is done next about the run of ``story``."""
    actions = list(_decide_user(story, seen, now))
    for pod in seen.pods:
        gang = _find_gang(story, number_of(pod), seen)
        if pod not in gang.pods:
            gang = replace(gang, pods=[pod], ending=None)
        if "nodeName" in pod["spec"] or has_ended(pod):
            action = _decide_kubelet(pod, gang, now)
        else:
            action = _bind(story, pod) if _age(pod, now) >= story.pause else None
        actions += [action] if action is not None else []
    return actions


def _decide_user(story: Story, seen: Seen, now: datetime) -> Iterable[Action]:
    run = seen.run
    if run is None or "deletionTimestamp" in run["metadata"]:
        return
    status, path = run.get("status", {}), f"{RUNS.format(story.namespace)}/{story.name}"
    if story.rule == stories.QUOTA and any(item["reason"] == _NO_QUOTA for item in status.get("conditions", [])):
        yield _raise_quota(story.namespace)
    if run["spec"]["runPolicy"].get("suspend"):
        if status.get("phase") == Phase.SUSPENDED and status.get("reason") == "Suspended":
            yield _suspend(path, value=False)
        return
    attempt = status.get("attempt", 0)
    gang = _find_gang(story, (attempt, 0), seen)
    ending = gang.ending
    if any(map(is_asked, gang.pods)) or not gang.is_time(now):
        return
    if ending == stories.SUSPENDED and status.get("suspendedAttempt", 0) < attempt:
        yield _suspend(path, value=True)
    elif ending == stories.RUN_DELETED:
        yield _delete(path)
    elif ending == stories.JOB_DELETED:
        yield _delete(f"{JOBS.format(story.namespace)}/{child_name(story.name, attempt)}")
    elif ending == stories.POD_DELETED:
        yield _delete(_path(gang.pods[0]))


def _decide_kubelet(pod: Raw, gang: _Gang, now: datetime) -> Action | None:
    """The next step of a pod that has a node."""
    index = index_of(pod)
    if has_ended(pod):
        lost = gang.ending == stories.NODE_LOST and index == GANG - 1
        leaves = lost if not is_asked(pod) else _grace(pod) or not pod["metadata"].get("finalizers")
        return _delete(_path(pod), grace=0) if leaves else None
    if has_spoken(pod):
        # A sidecar runs on until the pod is asked to stop.
        return _set(pod, containers.compute_over(pod)) if is_asked(pod) else None
    if _started(pod) is None:
        return _set(pod, _compute_start(pod, gang))
    if any(map(is_asked, gang.pods)):
        return _set(pod, ended(75, gang.say("Checkpointed", "Saved a checkpoint", index)))
    if gang.ending is None or gang.ending in _UNTIL_ASKED:
        return None
    if not (any(map(is_done, gang.pods)) or gang.is_time(now)):
        return None
    return _set(pod, _compute_end(index, gang, gang.ending))


def _compute_start(pod: Raw, gang: _Gang) -> Raw | None:
    """What becomes of a pod that has a node; ``None``: it stays as it is."""
    if is_asked(pod):
        return {"phase": "Failed"}
    if pod["spec"]["nodeName"] in BAD_NODES:
        return REJECTION
    if gang.ending not in _NEVER_START:
        return running()
    reason = _NEVER_START[gang.ending]
    return None if _waiting_reason(pod) == reason[0] else waiting(*reason)


def _compute_end(index: int, gang: _Gang, ending: str) -> Raw | None:
    """How a pod ends whose time has come; ``None``: another one ends first."""
    if ending == stories.PASSES:
        return ended(0, settled(), "Completed")
    if ending in (stories.SUCCEEDS, stories.TOLD):
        metadata = gang.pods[0]["metadata"]
        adapter = adapter_of(metadata["namespace"], metadata["labels"][RUN_LABEL])
        return ended(0, "" if index else termination(adapter=adapter), "Completed")
    lead = 0 if ending == stories.NODE_LOST else gang.size - 1
    if index != lead and not any(map(is_done, gang.pods)):
        return None
    on_node = [{"type": "PodScheduled", "status": "True"}]
    if ending == stories.NODE_LOST and index != lead:
        lost = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "no word"}
        return {"phase": "Failed", "conditions": [*on_node, lost]}
    if index != lead or ending == stories.NODE_LOST:
        return ended(73, gang.say("PeerLost", "Connection closed by peer", index))
    if ending == stories.EVICTED:
        taken = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": "low"}
        return {**ended(143), "conditions": [*on_node, taken]}
    oom = ended(137, reason="OOMKilled")
    simple = {stories.KILLED: ended(137), stories.OOM: oom, stories.NODE_FULL: oom, stories.CRASHES: ended(1)}
    if ending in simple:
        return simple[ending]
    code = RULES[FailureClass(ending)].exit_code
    if code is None:
        raise ValueError(f"no trainer ends with {ending}")
    return ended(code, gang.say(ending, "It broke", index))


def compute_log(story: Story, pod: Raw, now: datetime) -> str:
    """The end of what ``pod`` has written: rank 0 of an attempt tells of a step each second, if it does not stall."""
    attempt, _ = number_of(pod)
    created = parse_time(pod["metadata"]["creationTimestamp"]) or now
    until = now if _started(pod) else parse_time(find_trainer(pod).get("terminated", {}).get("finishedAt")) or created
    if story.ending(attempt) == stories.STALLS:
        until = min(until, created + timedelta(seconds=story.pause + story.runs_for))
    if not attempt or index_of(pod):
        return ""
    last = int((until - created).total_seconds())
    return "".join(
        ProgressLine(
            event="step",
            at=created + timedelta(seconds=second),
            step=_STEPS * attempt + second,
            total_steps=_STEPS * (attempt + 1),
            loss=1.0,
        ).to_line()
        + "\n"
        for second in range(max(1, last - _LOG_LINES), last + 1)
    )


def _progress(run: Raw | None) -> int:
    """The step that the status tells of."""
    return int(((run or {}).get("status", {}).get("progress") or {}).get("step", 0))


def _started(pod: Raw) -> datetime | None:
    return parse_time(find_trainer(pod).get("running", {}).get("startedAt"))


def _waiting_reason(pod: Raw) -> str | None:
    reason: str | None = find_trainer(pod).get("waiting", {}).get("reason")
    return reason


def _grace(pod: Raw) -> int:
    return int(pod["metadata"].get("deletionGracePeriodSeconds", 0))


def _age(pod: Raw, now: datetime) -> float:
    return (now - (parse_time(pod["metadata"]["creationTimestamp"]) or now)).total_seconds()


def _path(pod: Raw) -> str:
    return f"{PODS.format(pod['metadata']['namespace'])}/{pod['metadata']['name']}"


def _set(pod: Raw, status: Raw | None) -> Action | None:
    if status is None:
        return None
    told = containers.show_all(pod, status, asked=is_asked(pod))
    return Action("PATCH", f"{_path(pod)}/status", {"status": told}, MERGE)


def _bind(story: Story, pod: Raw) -> Action:
    attempt, _ = number_of(pod)
    node = choose_node(pod, index_of(pod), story.bad_nodes(attempt) if index_of(pod) == GANG - 1 else 0)
    target = {"apiVersion": "v1", "kind": "Node", "name": node}
    return Action("POST", f"{_path(pod)}/binding", {"metadata": {"name": pod["metadata"]["name"]}, "target": target})


def _raise_quota(namespace: str) -> Action:
    path = f"/api/v1/namespaces/{namespace}/resourcequotas/{RULE}"
    return Action("PATCH", path, {"spec": {"hard": {"pods": str(_ENOUGH_PODS)}}}, MERGE)


def _suspend(path: str, *, value: bool) -> Action:
    return Action("PATCH", path, {"spec": {"runPolicy": {"suspend": value}}}, MERGE)


def _delete(path: str, **options: Any) -> Action:
    seconds = {"gracePeriodSeconds": options["grace"]} if options else {}
    return Action("DELETE", path, {"propagationPolicy": "Background", **seconds})
