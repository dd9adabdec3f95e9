"""The logs of pods: what a run tells while it runs, and its last words."""

import logging

from lora_api import Failure, FailureClass
from lora_api.run import CONTAINER_NAME
from lora_operator.evidence.logtext import tell_people
from lora_operator.kube.client import KubeClient, KubeError, NotFoundError
from lora_operator.state.observed import Observed
from lora_operator.watched.cache import Cache, Resource
from lora_operator.watched.views import PodView

logger = logging.getLogger(__name__)

LAST_LINES = 200
"""As many as are read for progress: most of them may be progress, which people get in a word."""

LAST_CHARACTERS = 4000


class PodLogs:
    """Reads logs. They go with their pods and nodes, so that one cannot be read is no error."""

    def __init__(self, cache: Cache, kube: KubeClient) -> None:
        self._cache = cache
        self._kube = kube

    async def fetch(self, pod: PodView, lines: int) -> str | None:
        """The end of the pod's log, or ``None`` where it cannot be read."""
        try:
            return await self._kube.fetch_log(pod.namespace, pod.name, CONTAINER_NAME, lines)
        except NotFoundError:
            logger.info("%s/%s: the pod is gone, and no watch said so", pod.namespace, pod.name)
            self._cache.discard((Resource.PODS, pod.namespace, pod.name))
        except KubeError as error:
            logger.info("%s/%s: log not read: %s", pod.namespace, pod.name, error)
        return None

    async def add_last_words(self, observed: Observed, failure: Failure) -> Failure:
        """``failure`` with the last lines of the failing pod's log; of a gang that stalled, with those of every pod."""
        if failure.failure_class is FailureClass.STALLED:
            return failure.model_copy(update={"log_tail": await self._fetch_last_words_of_all(observed)})
        pod = next((pod for pod in observed.pods if pod.name == failure.pod and not pod.gone), None)
        if pod is None or not (pod.running or pod.ended):
            return failure
        log = tell_people(await self.fetch(pod, LAST_LINES) or "")
        return failure.model_copy(update={"log_tail": log[-LAST_CHARACTERS:]}) if log else failure

    async def _fetch_last_words_of_all(self, observed: Observed) -> str:
        """The last lines of every pod that runs, an equal share of what there is room for."""
        pods = [pod for pod in observed.pods if pod.running and not pod.gone]
        share = LAST_CHARACTERS // max(1, len(pods))
        words = []
        for pod in pods:
            log = tell_people(await self.fetch(pod, LAST_LINES) or "no log")
            head = f"{pod.name}: "
            words.append(head + log.strip()[-max(0, share - len(head) - 1) :])
        return "\n".join(words)
