"""Looks up what is asked: watches are late, and another operator may be at work. IO only."""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from lora_api import PLURAL
from lora_operator.controller.questions import JobAsItIs, JobOf, Leftovers, NamespaceLabels, PodsOf, Question, RunAsItIs
from lora_operator.evidence.memory import Memory
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import KubeError, NotFoundError
from lora_operator.lifecycle.refusals import is_refusal
from lora_operator.names import JOB_NAME_LABEL, RUN_LABEL, child_name
from lora_operator.objects import Key
from lora_operator.state.observed import Observed
from lora_operator.state.reports import hear_denied
from lora_operator.watched.cache import Cache, Resource

logger = logging.getLogger(__name__)

FORBIDDEN = 403


class Answerer:
    """Brings the cache up to date where it cannot be right, or must be."""

    def __init__(self, cache: Cache, kube: KubeClient, memory: Memory, clock: Callable[[], datetime]) -> None:
        self._cache = cache
        self._kube = kube
        self._memory = memory
        self._clock = clock

    async def answer(self, key: Key, observed: Observed, question: Question) -> Any:
        """Looks up the answer to ``question``; it is ``None`` where the cache has it.

        Where that is refused, it is kept for the status, and what the watches have shown has to do.

        Raises:
            KubeError: an error that passes.
        """
        permission, words, status = _permission_of(question), None, 0
        try:
            answer = await self._look_up(key, observed, question)
        except KubeError as error:
            if not is_refusal(error.status, error.message):
                raise
            logger.warning("%s/%s: may not %s: %s", *key, permission, error)
            answer, words, status = None, error.message, error.status
        uid, now = observed.run.metadata.uid, self._clock()
        self._memory.change(key, uid, lambda reports: hear_denied(reports, permission, words, now, status))
        return answer

    async def _look_up(self, key: Key, observed: Observed, question: Question) -> Any:
        match question:
            case NamespaceLabels():
                return await self._fetch_labels(key[0])
            case RunAsItIs():
                await self.fetch_run(key)
            case JobOf(attempt):
                await self._fetch_job(key[0], child_name(key[1], attempt))
            case JobAsItIs(job):
                await self._fetch_job(key[0], job.name)
            case PodsOf(job):
                names = [pod.name for pod in observed.gang(job)]
                await self._fetch_pods(key, f"{JOB_NAME_LABEL}={job.name}", names)
            case Leftovers(names):
                await self._fetch_pods(key, f"{RUN_LABEL}={key[1]}", sorted(names))
        return None

    async def fetch_run(self, key: Key) -> bool:
        """The run itself, that somebody else has written. Whether that is news: if so, no event will tell of it."""
        try:
            return self._cache.put(Resource.RUNS, await self._kube.fetch_object(PLURAL, *key)) is not None
        except NotFoundError:
            self._cache.forget_run(key)
            return True

    async def _fetch_labels(self, namespace: str) -> Mapping[str, str] | None:
        """The labels of ``namespace``; ``None`` where the operator's role does not allow to read them."""
        try:
            found = await self._kube.fetch_object("namespaces", None, namespace)
        except KubeError as error:
            if error.status != FORBIDDEN:
                raise
            return None
        return dict(found["metadata"].get("labels") or {})

    async def _fetch_job(self, namespace: str, name: str) -> None:
        try:
            job = await self._kube.fetch_object("jobs", namespace, name)
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


def _permission_of(question: Question) -> str:
    """What the operator's role has to allow for an answer."""
    match question:
        case NamespaceLabels():
            return "get namespaces"
        case RunAsItIs():
            return "get lorafinetunes"
        case JobOf() | JobAsItIs():
            return "get jobs"
        case PodsOf() | Leftovers():
            return "list pods"
