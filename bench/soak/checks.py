"""What is wrong at the end of the soak, a sentence each. Pure."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.scale.audit import Call
from bench.scale.client import Raw
from bench.soak.player import has_ended, number_of
from bench.soak.stories import Outcome, Story, compute_outcome
from lora_api import Phase
from lora_api.run import CONTAINER_NAME
from lora_operator.names import RUN_ANNOTATION, RUN_LABEL, child_name, preflight_name


@dataclass(frozen=True)
class Found:
    """All objects that there are, by kind; but for ``runs``, those that carry the name of a run."""

    runs: Sequence[Raw] = ()
    jobs: Sequence[Raw] = ()
    pods: Sequence[Raw] = ()
    services: Sequence[Raw] = ()
    policies: Sequence[Raw] = ()

    def all(self) -> list[Raw]:
        """Every object."""
        return [*self.runs, *self.jobs, *self.pods, *self.services, *self.policies]


def find_wrong_ends(told: Sequence[Story], found: Found) -> list[str]:
    """Runs that are not where their stories end."""
    runs = {run["metadata"]["name"]: run for run in found.runs}
    wrong = []
    for story in told:
        outcome, run = compute_outcome(story), runs.get(story.name)
        differences = _compare(outcome, run)
        if differences:
            wrong.append(f"{story.namespace}/{story.name} {story.kind} ({_endings(story)}): {'; '.join(differences)}")
    return wrong


def _endings(story: Story) -> str:
    return ", ".join((*(f"preflight {ending}" for ending in story.preflights), *story.attempts))


def _compare(outcome: Outcome, run: Raw | None) -> list[str]:
    if outcome.phase is None or run is None:
        right = outcome.phase is None and run is None
        return [] if right else [f"is {'gone' if run is None else 'there'}"]
    status = run.get("status", {})
    ended = "Complete" if outcome.phase is Phase.SUCCEEDED else "Failed"
    pairs = {
        "phase": (status.get("phase"), outcome.phase),
        "condition": ([item["type"] for item in status.get("conditions", []) if item["type"] == ended
                       and item["status"] == "True"], [ended]),
        "attempt": (status.get("attempt", 0), outcome.attempt),
        "charged restarts": (status.get("chargedRestarts", 0), outcome.charged),
        "failed preflights": (status.get("failedPreflights", 0), outcome.failed_preflights),
        "micro-batch": (status.get("microBatchSize"), outcome.micro_batch),
        "adapter": ("adapter" in status, outcome.phase is Phase.SUCCEEDED),
        "progress": ((status.get("progress") or {}).get("percent") if outcome.told else 100, 100),
    }  # fmt: skip
    differences = [f"{name} is {got}, not {want}" for name, (got, want) in pairs.items() if got != want]
    classes = [failure["class"] for failure in status.get("failures", [])]
    right = len(classes) == len(outcome.failures) and all(
        one in several for one, several in zip(classes, outcome.failures, strict=True)
    )
    return differences if right else [*differences, f"failures are {classes}, not {list(map(list, outcome.failures))}"]


def find_orphans(found: Found) -> list[str]:
    """Children whose owner is gone, and objects that are on their way out."""
    uids = {item["metadata"]["uid"] for item in found.all()}
    wrong = []
    for item in found.all():
        metadata = item["metadata"]
        lost = [owner for owner in metadata.get("ownerReferences", ()) if owner["uid"] not in uids]
        wrong += [f"{_name(item)} belongs to {owner['kind']} {owner['name']}, which is gone" for owner in lost]
        if "deletionTimestamp" in metadata:
            wrong.append(f"{_name(item)} is being deleted since {metadata['deletionTimestamp']}")
    return wrong


def find_leftovers(told: Sequence[Story], found: Found) -> list[str]:
    """Jobs of attempts that others followed, pods that run on after the end, and children that a TTL had to take."""
    stories = {story.name: story for story in told}
    wrong = [f"{_name(pod)} runs on" for pod in found.pods if not has_ended(pod)]
    for item in (*found.jobs, *found.services, *found.policies):
        story = stories[item["metadata"]["labels"][RUN_LABEL]]
        outcome = compute_outcome(story)
        last = (child_name(story.name, outcome.attempt), preflight_name(story.name, len(story.preflights)))
        if not outcome.children or (item["kind"] == "Job" and item["metadata"]["name"] not in last):
            wrong.append(f"{_name(item)} is still there")
    return wrong


def _name(item: Raw) -> str:
    return f"{item['kind']} {item['metadata']['namespace']}/{item['metadata']['name']}"


def find_wrong_jobs(told: Sequence[Story], calls: Iterable[Call]) -> list[str]:
    """Jobs that were made twice, or after the end of their run; ``calls`` are those of all operators.

    One of a run that was deleted may have been made once more: whoever had decided so before cannot know, and the
    garbage collector takes it, its owner being gone.
    """
    made = Counter(call.name for call in calls if (call.resource, call.verb, call.code) == ("jobs", "create", 201))
    outcomes = {story.name: compute_outcome(story) for story in told}
    known = {preflight_name(story.name, number) for story in told for number in range(1, len(story.preflights) + 1)}
    known |= {child_name(name, attempt) for name, one in outcomes.items() for attempt in range(1, one.attempt + 1)}
    gone = {child_name(name, one.attempt) for name, one in outcomes.items() if one.phase is None}
    wrong = [f"Job {name} was made {count} times" for name, count in made.items() if count > 1 + (name in gone)]
    return wrong + [f"Job {name} was made, but there is no such attempt" for name in sorted(made.keys() - known)]


def find_wrong_events(told: Sequence[Story], events: Iterable[Raw]) -> list[str]:
    """Runs with more than one end, or several Events of one reason about one attempt, or about one that never was."""
    outcomes = {story.name: compute_outcome(story) for story in told}
    seen: Counter[tuple[str, str, str]] = Counter()
    ends: Counter[str] = Counter()
    wrong = []
    for event in events:
        name = event["regarding"]["name"]
        about = event["metadata"]["name"].split(".")[2]
        seen[name, about, event["reason"]] += 1
        ends[name] += event["action"] in ("Publish", "Fail")
        if about.isdecimal() and int(about) > outcomes[name].attempt:
            wrong.append(
                f"{name} has an Event {event['reason']} of attempt {about}, but {outcomes[name].attempt} in all"
            )
    for (name, about, reason), count in seen.items():
        if count > 1:
            wrong.append(f"{name} has {count} Events {reason} of attempt {about}")
    return wrong + [f"{name} has ended {count} times, by its Events" for name, count in ends.items() if count > 1]


@dataclass(frozen=True)
class Trainer:
    """The trainer of the pods of an attempt, and the version of the document that they are given.

    ``document`` is 0 where it is not in the pod, as under the release before.
    """

    run: str
    attempt: int
    image: str
    document: int

    @classmethod
    def of(cls, pod: Raw) -> "Trainer":
        """That of ``pod``."""
        metadata = pod["metadata"]
        [image] = [item["image"] for item in pod["spec"]["containers"] if item["name"] == CONTAINER_NAME]
        told = (metadata.get("annotations") or {}).get(RUN_ANNOTATION)
        version = json.loads(told)["version"] if told else 0
        return cls(metadata["labels"][RUN_LABEL], number_of(pod)[0], image, version)


TRAINER_UNKNOWN = "TrainerUnknown"
"""Reason of the Event by which an operator says that it cannot know which trainer a run had."""


def find_wrong_trainers(trainers: Iterable[Trainer], reads: Mapping[str, int], events: Iterable[Raw]) -> list[str]:
    """Runs that got another trainer on the way without a word, and pods that cannot read their documents.

    ``reads`` has the newest version of the document that each image reads.
    """
    trainers = sorted(trainers, key=lambda one: (one.run, one.attempt))
    told = {event["regarding"]["name"] for event in events if event["reason"] == TRAINER_UNKNOWN}
    images: dict[str, set[str]] = {}
    for one in trainers:
        images.setdefault(one.run, set()).add(one.image)
    changed = [(run, sorted(several)) for run, several in images.items() if len(several) > 1 and run not in told]
    return [
        *(f"{run} had several trainers: {', '.join(several)}" for run, several in changed),
        *(
            f"attempt {one.attempt} of {one.run} has a document of version {one.document}, too new for {one.image}"
            for one in trainers
            if one.document > reads[one.image]
        ),
    ]


def find_growth(before: float, after: float, more_runs: int, kib_per_run: float, margin: float) -> list[str]:
    """Whether an operator that had ``before`` MiB and has ``after``, with ``more_runs`` runs, grew for no reason."""
    allowed = before + more_runs * kib_per_run / 1024 + margin
    if after <= allowed:
        return []
    return [
        f"the operator grew from {before:.1f} to {after:.1f} MiB with {more_runs} more runs; {allowed:.1f} is right"
    ]
