"""What the operator knows of the cluster: plain dictionaries, filled by one LIST, the watches and its own writes.

Never older than the last write: an object replaces another only when its resourceVersion is not smaller (they can be
compared as numbers, KEP-5504), and a deleted object does not come back from a slow answer.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeVar

from lora_api.finetune import ObjectMeta
from lora_operator.objects import Key, Raw
from lora_operator.watched.documents import Document, RunDocument, parse_document, parse_run_document
from lora_operator.watched.views import JobView, PodView, parse_job, parse_pod

_REMEMBERED_DELETIONS = 20_000

V = TypeVar("V", JobView, PodView)
D = TypeVar("D", Document, RunDocument)
K = TypeVar("K", Key, str)


class Resource(StrEnum):
    """The kinds that are watched, by their plural."""

    RUNS = "lorafinetunes"
    JOBS = "jobs"
    PODS = "pods"
    RUNTIMES = "clusterloraruntimes"

    @property
    def namespaced(self) -> bool:
        """Whether its objects lie in namespaces."""
        return self is not Resource.RUNTIMES


ObjectKey = tuple[Resource, str, str]
"""Resource, namespace (empty for one of the cluster) and name."""


class Cache:
    """Runs and runtimes as documents, Jobs and pods as views, grouped by run."""

    def __init__(self) -> None:
        self._runs: dict[Key, RunDocument] = {}
        self._runtimes: dict[str, Document] = {}
        self._jobs: dict[Key, dict[str, JobView]] = {}
        self._pods: dict[Key, dict[str, PodView]] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()

    def put(self, resource: Resource, raw: Mapping[str, Any]) -> Key | None:
        """Keeps ``raw`` if it is news; returns the one run that it concerns, or ``None`` if it is no news."""
        match resource:
            case Resource.RUNS:
                key = raw["metadata"]["namespace"], raw["metadata"]["name"]
                return key if self._put_document(self._runs, key, parse_run_document(raw)) else None
            case Resource.JOBS:
                job = parse_job(raw)
                return self._put_view(self._jobs, job) if job.run else None
            case Resource.PODS:
                pod = parse_pod(raw)
                return self._put_view(self._pods, pod) if pod.run else None
            case Resource.RUNTIMES:
                self._put_document(self._runtimes, raw["metadata"]["name"], parse_document(raw))
                return None

    def remove(self, resource: Resource, raw: Mapping[str, Any]) -> Key | None:
        """Takes ``raw`` out; returns the one run that it concerns.

        The last sight of a pod is kept as long as its Job is there: it may hold the pod's last words.
        """
        match resource:
            case Resource.RUNS:
                key = raw["metadata"]["namespace"], raw["metadata"]["name"]
                self._remove_document(self._runs, key, raw["metadata"]["uid"])
                return key
            case Resource.JOBS:
                return self.remove_job(parse_job(raw))
            case Resource.PODS:
                return self._remove_pod(parse_pod(raw))
            case Resource.RUNTIMES:
                self._remove_document(self._runtimes, raw["metadata"]["name"], raw["metadata"]["uid"])
                return None

    def remove_job(self, job: JobView) -> Key:
        """Takes ``job`` out, and what is remembered of its pods that are gone."""
        self._bury(job.uid)
        jobs = self._jobs.get(job.key, {})
        if job.name in jobs and jobs[job.name].uid == job.uid:
            del jobs[job.name]
        pods = self._pods.get(job.key, {})
        for name in [name for name, pod in pods.items() if pod.gone and pod.job_uid == job.uid]:
            del pods[name]
        self._drop_empty(job.key)
        return job.key

    def forget_run(self, key: Key) -> None:
        """Takes out a run that the API server no longer knows."""
        run = self._runs.pop(key, None)
        if run is not None:
            self._bury(run.uid)

    def run(self, key: Key) -> Raw | None:
        """The run, but for metadata that nobody reads."""
        run = self._runs.get(key)
        return None if run is None else run.read()

    def is_current(self, metadata: ObjectMeta) -> bool:
        """Whether the run is there as ``metadata`` tells, as far as the watches know."""
        run = self._runs.get((metadata.namespace, metadata.name))
        return run is not None and run.uid == metadata.uid and str(run.version) == metadata.resource_version

    def runtime(self, name: str) -> Raw | None:
        """The ClusterLoRARuntime, but for metadata that nobody reads."""
        runtime = self._runtimes.get(name)
        return None if runtime is None else runtime.read()

    def runs_waiting_for(self, runtime: str) -> list[Key]:
        """The runs that have not begun and are to take ``runtime``."""
        return [key for key, run in self._runs.items() if run.awaits == runtime]

    def jobs(self, key: Key) -> list[JobView]:
        """The Jobs that carry the run's name."""
        return list(self._jobs.get(key, {}).values())

    def pods(self, key: Key) -> list[PodView]:
        """The pods that carry the run's name, gone ones included."""
        return list(self._pods.get(key, {}).values())

    def run_keys(self) -> list[Key]:
        """Every run."""
        return list(self._runs)

    def object_keys(self, resource: Resource, namespace: str | None) -> set[ObjectKey]:
        """Every object of ``resource`` that is believed to exist, in ``namespace`` or in all."""
        names: list[Key]
        match resource:
            case Resource.RUNS:
                names = list(self._runs)
            case Resource.JOBS:
                names = [(job.namespace, job.name) for jobs in self._jobs.values() for job in jobs.values()]
            case Resource.PODS:
                names = [
                    (pod.namespace, pod.name) for pods in self._pods.values() for pod in pods.values() if not pod.gone
                ]
            case Resource.RUNTIMES:
                names = [("", name) for name in self._runtimes]
        return {(resource, at, name) for at, name in names if namespace in (None, at)}

    def discard(self, key: ObjectKey) -> Key | None:
        """Takes out an object that the API server no longer knows; returns the one run that it concerns."""
        resource, namespace, name = key
        if resource is Resource.RUNTIMES:
            self._runtimes.pop(name, None)
            return None
        if resource is Resource.RUNS:
            self.forget_run((namespace, name))
            return namespace, name
        for jobs in list(self._jobs.values()) if resource is Resource.JOBS else ():
            if name in jobs and jobs[name].namespace == namespace:
                return self.remove_job(jobs[name])
        for pods in list(self._pods.values()) if resource is Resource.PODS else ():
            if name in pods and pods[name].namespace == namespace:
                return self._remove_pod(pods[name])
        return None

    def runs_by_phase(self) -> Counter[str]:
        """How many runs there are in each phase."""
        return Counter(run.phase for run in self._runs.values())

    def tokens_per_second(self) -> dict[str, float]:
        """Speed of all runs that train now, by namespace."""
        speeds: dict[str, float] = {}
        for (namespace, _), run in self._runs.items():
            if run.phase == "Running":
                speeds[namespace] = speeds.get(namespace, 0.0) + run.tokens_per_second
        return speeds

    def _put_document(self, table: dict[K, D], key: K, new: D) -> bool:
        """Keeps ``new`` if it is news; returns whether it is."""
        old = table.get(key)
        if new.uid in self._deleted or (old is not None and old.version > new.version):
            return False
        if old == new:  # not by its version alone: another version of the CRD shows the same object with other fields
            return False
        table[key] = new
        return True

    def _remove_document(self, table: dict[K, D], key: K, uid: str) -> None:
        self._bury(uid)
        if key in table and table[key].uid == uid:
            del table[key]

    def _put_view(self, table: dict[Key, dict[str, V]], view: V) -> Key | None:
        views = table.setdefault(view.key, {})
        old = views.get(view.name)
        if view.uid in self._deleted or (old is not None and old.version >= view.version):
            self._drop_empty(view.key)
            return None
        views[view.name] = view
        return view.key

    def _remove_pod(self, pod: PodView) -> Key | None:
        if not pod.run:
            return None
        self._bury(pod.uid)
        pods = self._pods.get(pod.key, {})
        known = pods.get(pod.name)
        if known is not None and known.uid == pod.uid:
            if any(job.uid == pod.job_uid for job in self.jobs(pod.key)):
                latest = pod if pod.version >= known.version else known
                pods[pod.name] = replace(latest, gone=True)
            else:
                del pods[pod.name]
        self._drop_empty(pod.key)
        return pod.key

    def _bury(self, uid: str) -> None:
        self._deleted[uid] = None
        if len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)

    def _drop_empty(self, key: Key) -> None:
        if not self._jobs.get(key, True):
            del self._jobs[key]
        if not self._pods.get(key, True):
            del self._pods[key]
