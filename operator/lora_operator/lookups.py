"""What is looked up before it is acted upon: watches are late, and another operator may be at work."""

from collections.abc import Mapping, Sequence

from lora_api import PLURAL, LoRAFineTune
from lora_operator.cache import Cache, Resource
from lora_operator.children.names import JOB_NAME_LABEL, RUN_LABEL, child_name
from lora_operator.follow import missing_attempt
from lora_operator.kube import KubeClient, KubeError, NotFoundError
from lora_operator.observed import Observed
from lora_operator.views import JobView, Key, PodView

FORBIDDEN = 403


class Lookups:
    """Brings the cache up to date where it cannot be right, or must be."""

    def __init__(self, cache: Cache, kube: KubeClient) -> None:
        self._cache = cache
        self._kube = kube

    async def fetch_run(self, key: Key) -> bool:
        """The run itself, that somebody else has written. Whether that is news: if so, no event will tell of it."""
        try:
            return self._cache.put(Resource.RUNS, await self._kube.fetch_object(PLURAL, *key)) is not None
        except NotFoundError:
            self._cache.forget_run(key)
            return True

    async def fetch_labels(self, namespace: str) -> Mapping[str, str] | None:
        """The labels of ``namespace``; ``None`` where the operator's role does not allow to read them."""
        try:
            found = await self._kube.fetch_object("namespaces", None, namespace)
        except KubeError as error:
            if error.status != FORBIDDEN:
                raise
            return None
        return dict(found["metadata"].get("labels") or {})

    async def is_current(self, key: Key, run: LoRAFineTune) -> bool:
        """Whether ``run`` is still as it was seen."""
        await self.fetch_run(key)
        return self._cache.is_current(run.metadata)

    async def find_job(self, key: Key, observed: Observed) -> bool:
        """Whether a Job that has to be there is: another operator may have made it."""
        attempt = missing_attempt(observed)
        if attempt is None:
            return False
        try:
            job = await self._kube.fetch_object("jobs", key[0], child_name(key[1], attempt))
        except NotFoundError:
            return False
        self._cache.put(Resource.JOBS, job)
        return True

    async def fetch_pods(self, key: Key, observed: Observed, job: JobView) -> None:
        """The pods of ``job``, where no watch has shown what became of some of them."""
        await self._fetch_pods(key, f"{JOB_NAME_LABEL}={job.name}", observed.gang(job))

    async def fetch_leftovers(self, key: Key, leftovers: Sequence[PodView]) -> None:
        """Pods that stay though their Job is gone: no watch may have told that they went."""
        await self._fetch_pods(key, f"{RUN_LABEL}={key[1]}", leftovers)

    async def _fetch_pods(self, key: Key, selector: str, known: Sequence[PodView]) -> None:
        missing = {pod.name for pod in known}
        async for pod in self._kube.fetch_list("pods", key[0], selector):
            self._cache.put(Resource.PODS, pod)
            missing.discard(pod["metadata"]["name"])
        for name in missing:
            self._cache.discard((Resource.PODS, key[0], name))
