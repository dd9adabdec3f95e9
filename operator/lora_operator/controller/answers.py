"""Looks up what is asked: watches are late, and another operator may be at work. IO only."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_api import PLURAL
from lora_operator.controller.questions import JobOf, Leftovers, NamespaceLabels, PodsOf, Question, RunAsItIs
from lora_operator.kube.client import KubeClient, KubeError, NotFoundError
from lora_operator.names import JOB_NAME_LABEL, RUN_LABEL, child_name
from lora_operator.objects import Key
from lora_operator.state.observed import Observed
from lora_operator.watched.cache import Cache, Resource

FORBIDDEN = 403


class Answerer:
    """Brings the cache up to date where it cannot be right, or must be."""

    def __init__(self, cache: Cache, kube: KubeClient) -> None:
        self._cache = cache
        self._kube = kube

    async def answer(self, key: Key, observed: Observed, question: Question) -> Any:
        """Looks up the answer to ``question``; it is ``None`` where the cache has it."""
        match question:
            case NamespaceLabels():
                return await self._fetch_labels(key[0])
            case RunAsItIs():
                await self.fetch_run(key)
            case JobOf(attempt):
                await self._fetch_job(key, attempt)
            case PodsOf(job):
                names = [pod.name for pod in observed.gang(job)]
                await self._fetch_pods(key, f"{JOB_NAME_LABEL}={job.name}", names)
            case Leftovers(names):
                await self._fetch_pods(key, f"{RUN_LABEL}={key[1]}", sorted(names))
        return None

    async def fetch_run(self, key: Key) -> None:
        """The run itself, that somebody else has written."""
        try:
            self._cache.put(Resource.RUNS, await self._kube.fetch_object(PLURAL, *key))
        except NotFoundError:
            self._cache.forget_run(key)

    async def _fetch_labels(self, namespace: str) -> Mapping[str, str] | None:
        """The labels of ``namespace``; ``None`` where the operator's role does not allow to read them."""
        try:
            found = await self._kube.fetch_object("namespaces", None, namespace)
        except KubeError as error:
            if error.status != FORBIDDEN:
                raise
            return None
        return dict(found["metadata"].get("labels") or {})

    async def _fetch_job(self, key: Key, attempt: int) -> None:
        try:
            job = await self._kube.fetch_object("jobs", key[0], child_name(key[1], attempt))
        except NotFoundError:
            return
        self._cache.put(Resource.JOBS, job)

    async def _fetch_pods(self, key: Key, selector: str, known: Sequence[str]) -> None:
        missing = set(known)
        async for pod in self._kube.fetch_list("pods", key[0], selector):
            self._cache.put(Resource.PODS, pod)
            missing.discard(pod["metadata"]["name"])
        for name in missing:
            self._cache.discard((Resource.PODS, key[0], name))
