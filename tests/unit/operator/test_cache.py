"""The cache is never older than the last write, and keeps the last sight of lost pods."""

from typing import Any

import pytest

from lora_api.finetune import ObjectMeta
from lora_operator.watched.cache import Cache, Resource
from lora_operator.watched.views import parse_indexes, parse_job, parse_pod
from tests.unit.operator.builders import NOW

AT = "2026-11-23T12:00:00Z"
KEY = ("team", "tickets")


def raw(name: str, version: int, *, uid: str = "", owner: str = "run-uid", **more: Any) -> dict[str, Any]:
    labels = {
        "lorafinetune.io/name": "tickets",
        "lorafinetune.io/attempt": "1",
        "batch.kubernetes.io/controller-uid": owner,
    }
    metadata = {
        "name": name,
        "namespace": "team",
        "uid": uid or name,
        "resourceVersion": str(version),
        "creationTimestamp": AT,
        "labels": labels,
        "ownerReferences": [{"uid": owner, "controller": True}],
        "managedFields": [{"manager": "someone"}],
    }
    return {"metadata": metadata, **more}


def a_raw_pod(name: str = "tickets-1-0-abcde", version: int = 5, **more: Any) -> dict[str, Any]:
    return raw(name, version, owner="tickets-1", **more)


def test_an_older_answer_does_not_replace_a_newer_one() -> None:
    cache = Cache()
    assert cache.put(Resource.RUNS, raw("tickets", 7, status={"phase": "Running"})) == KEY
    assert cache.put(Resource.RUNS, raw("tickets", 6, status={"phase": "Starting"})) is None
    assert cache.put(Resource.RUNS, raw("tickets", 7, status={"phase": "Running"})) is None, "what is known is no news"
    run = cache.run(KEY)
    assert run is not None
    assert run["status"] == {"phase": "Running"}
    assert "managedFields" not in run["metadata"]
    assert cache.runs_by_phase() == {"Running": 1}


def test_a_run_is_current_until_the_watch_tells_of_another() -> None:
    cache = Cache()
    cache.put(Resource.RUNS, raw("tickets", 7))
    seen = ObjectMeta(name="tickets", namespace="team", uid="tickets", resource_version="7")
    assert cache.is_current(seen)
    assert not cache.is_current(seen.model_copy(update={"uid": "another"}))
    cache.put(Resource.RUNS, raw("tickets", 8))
    assert not cache.is_current(seen)
    cache.remove(Resource.RUNS, raw("tickets", 9))
    assert not cache.is_current(seen)


def test_the_same_version_in_another_form_is_news() -> None:
    """As after a change of the CRD, which adds or takes away fields of objects that nobody wrote."""
    cache = Cache()
    cache.put(Resource.RUNS, raw("tickets", 7, spec={"later": "yes"}))
    assert cache.put(Resource.RUNS, raw("tickets", 7, spec={})) == KEY
    run = cache.run(KEY)
    assert run is not None
    assert run["spec"] == {}


def test_a_pod_or_a_job_of_a_version_that_is_known_is_no_news() -> None:
    cache = Cache()
    job = raw("tickets-1", 5)
    assert cache.put(Resource.PODS, a_raw_pod(version=5)) == KEY
    assert [cache.put(Resource.PODS, a_raw_pod(version=version)) for version in (4, 5, 6)] == [None, None, KEY]
    assert [cache.put(Resource.JOBS, job), cache.put(Resource.JOBS, job)] == [KEY, None]


def test_versions_are_numbers() -> None:
    cache = Cache()
    cache.put(Resource.RUNS, raw("tickets", 9))
    assert cache.put(Resource.RUNS, raw("tickets", 10)) == KEY


def test_what_was_deleted_does_not_come_back_from_a_slow_answer() -> None:
    cache = Cache()
    for resource, name in ((Resource.RUNS, "tickets"), (Resource.JOBS, "tickets-1")):
        cache.put(resource, raw(name, 5))
        cache.remove(resource, raw(name, 6))
        assert cache.put(resource, raw(name, 5)) is None
    assert (cache.run(KEY), cache.jobs(KEY)) == (None, [])


def test_another_object_of_the_same_name_is_news() -> None:
    cache = Cache()
    cache.put(Resource.RUNS, raw("tickets", 5))
    cache.remove(Resource.RUNS, raw("tickets", 6))
    assert cache.put(Resource.RUNS, raw("tickets", 7, uid="other")) == KEY
    cache.remove(Resource.RUNS, raw("tickets", 6))
    assert cache.run(KEY) is not None, "a late event about the old one does not remove the new one"


def test_the_last_sight_of_a_pod_is_kept_with_its_job() -> None:
    cache = Cache()
    cache.put(Resource.JOBS, raw("tickets-1", 1))
    cache.put(Resource.PODS, a_raw_pod())
    words = {"containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 75, "message": "words"}}}]}
    assert cache.remove(Resource.PODS, a_raw_pod(version=8, status=words)) == KEY
    (pod,) = cache.pods(KEY)
    assert (pod.gone, pod.ended and pod.ended.exit_code) == (True, 75)
    assert cache.object_keys(Resource.PODS, None) == set()
    cache.remove(Resource.JOBS, raw("tickets-1", 9))
    assert cache.pods(KEY) == []


def test_a_pod_without_its_job_is_forgotten() -> None:
    cache = Cache()
    cache.put(Resource.PODS, a_raw_pod())
    cache.remove(Resource.PODS, a_raw_pod(version=8))
    assert cache.pods(KEY) == []


def test_objects_that_are_none_of_ours_are_passed_over() -> None:
    cache = Cache()
    foreign = raw("other", 1)
    foreign["metadata"]["labels"] = {}
    for resource in (Resource.JOBS, Resource.PODS):
        assert cache.put(resource, foreign) is None
        cache.remove(resource, foreign)


@pytest.mark.parametrize(("resource", "name"), [(Resource.RUNS, "tickets"), (Resource.JOBS, "tickets-1")])
def test_discard(resource: Resource, name: str) -> None:
    cache = Cache()
    cache.put(resource, raw(name, 1))
    (key,) = cache.object_keys(resource, "team")
    assert cache.object_keys(resource, "elsewhere") == set()
    assert cache.discard(key) == KEY
    assert cache.object_keys(resource, None) == set()
    assert cache.discard(key) in (None, KEY)


@pytest.mark.parametrize(("text", "want"), [("", set()), ("0", {0}), ("1,3-5,7", {1, 3, 4, 5, 7}), ("0-1", {0, 1})])
def test_parse_indexes(text: str, want: set[int]) -> None:
    assert parse_indexes(text) == want


def test_parse_pod_reads_what_the_kubelet_writes() -> None:
    pod = parse_pod(
        a_raw_pod(
            status={
                "phase": "Failed",
                "reason": "Evicted",
                "conditions": [
                    {"type": "PodScheduled", "status": "True"},
                    {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": "low"},
                ],
                "containerStatuses": [
                    {
                        "name": "trainer",
                        "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": AT}},
                    }
                ],
            }
        )
    )  # fmt: skip
    assert (pod.phase, pod.reason, pod.disruption, pod.scheduled) == ("Failed", "Evicted", "TerminationByKubelet", True)
    assert pod.ended is not None
    assert (pod.ended.exit_code, pod.ended.reason, pod.ended.at) == (137, "OOMKilled", NOW)
    assert (pod.key, pod.attempt, pod.job_uid, pod.version) == (KEY, 1, "tickets-1", 5)


def test_a_bare_object_is_read_as_empty() -> None:
    pod = parse_pod(a_raw_pod())
    assert (pod.phase, pod.scheduled, pod.running, pod.ended, pod.has_ended) == ("Pending", False, False, None, False)
    job = parse_job(raw("tickets-1", 1))
    assert (job.failed_indexes, job.finished, job.stopping, job.failure) == (frozenset(), False, False, "")


SAYS = {"waiting": {"reason": "PodInitializing"}}
NO_SECRET = {"reason": "CreateContainerConfigError", "message": 'secret "store" not found'}
TOO_LARGE = {"exitCode": 128, "reason": "StartError", "message": "argument list too long"}

# A sentence that says the case: the states of init container and trainer, and what is seen of the pod.
STATES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, str, bool]]] = {
    "the Secret is missing": ({"waiting": NO_SECRET}, SAYS, ("CreateContainerConfigError", "", False)),
    "the Secret is too large": ({"terminated": TOO_LARGE}, SAYS, ("PodInitializing", "StartError", False)),
    "the init container runs": ({"running": {}}, SAYS, ("PodInitializing", "", False)),
    "the trainer runs": ({"terminated": {"exitCode": 0}}, {"running": {}}, ("", "", True)),
    "the trainer's image is missing": (
        {"terminated": {"exitCode": 0}}, {"waiting": {"reason": "ErrImagePull"}}, ("ErrImagePull", "", False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_parse_pod_sees_what_the_init_container_waits_for(case: str) -> None:
    first, trainer, want = STATES[case]
    status = {
        "initContainerStatuses": [{"name": "credentials", "state": first}],
        "containerStatuses": [{"name": "trainer", "state": trainer}],
    }
    pod = parse_pod(raw("tickets-1-0", 1, status=status))
    assert (pod.waiting_reason, pod.ended.reason if pod.ended else "", pod.running) == want


def test_parse_job_reads_what_the_controller_writes() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long"}
    status = {"failedIndexes": "0,2", "completedIndexes": "1", "conditions": [failed]}
    job = parse_job(raw("tickets-1", 1, spec={"maxFailedIndexes": 0}, status=status))
    assert (job.failed_indexes, job.completed_indexes) == ({0, 2}, {1})
    assert (job.finished, job.stopping, job.failure) == (True, True, "DeadlineExceeded: too long")


def a_raw_runtime(name: str, version: int, uid: str = "") -> dict[str, Any]:
    metadata = {"name": name, "uid": uid or name, "resourceVersion": str(version), "generation": 1, "labels": {}}
    return {"metadata": metadata, "spec": {"image": f"trainer:{version}"}}


def image(cache: Cache, name: str) -> str | None:
    runtime = cache.runtime(name)
    return runtime["spec"]["image"] if runtime is not None else None


def test_runtimes_are_known_by_name() -> None:
    cache = Cache()
    assert cache.put(Resource.RUNTIMES, a_raw_runtime("h100", 9)) is None, "it concerns no one run"
    cache.put(Resource.RUNTIMES, a_raw_runtime("h100", 8))
    assert (image(cache, "h100"), image(cache, "default")) == ("trainer:9", None)
    assert cache.object_keys(Resource.RUNTIMES, None) == {(Resource.RUNTIMES, "", "h100")}
    cache.put(Resource.RUNTIMES, a_raw_runtime("h100", 12, uid="another"))
    cache.remove(Resource.RUNTIMES, a_raw_runtime("h100", 11))
    assert image(cache, "h100") == "trainer:12", "only the earlier one of its name is gone"
    cache.discard((Resource.RUNTIMES, "", "h100"))
    assert image(cache, "h100") is None


def test_a_runtime_concerns_the_runs_that_are_to_take_it() -> None:
    cache = Cache()
    for name, spec, status in (
        ("waits", {"runtimeRef": {"name": "h100"}}, {"phase": "Pending"}),
        ("names-none", {}, {}),
        ("took-it", {"runtimeRef": {"name": "h100"}}, {"runtime": {"name": "h100"}}),
        ("runs", {"runtimeRef": {"name": "h100"}}, {"attempt": 1}),
    ):
        cache.put(Resource.RUNS, raw(name, 1, spec=spec, status=status))
    assert cache.runs_waiting_for("h100") == [("team", "waits")]
    assert cache.runs_waiting_for("default") == [("team", "names-none")]
