"""What this operator does not understand of a run, said once: in the log, and as an Event on the run."""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime

from lora_api import TrainerPin, build_run_spec
from lora_api.finetune import ObjectMeta
from lora_api.runversions import to_version
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import KubeError
from lora_operator.objects import Key
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan
from lora_operator.state.trainers import describe_unknown
from lora_operator.status.events import EventSpec, build_event

logger = logging.getLogger(__name__)

_ABOUT = "versions"


class Remarks:
    """Remembers what was said, as long as the run is there."""

    def __init__(self, kube: KubeClient, clock: Callable[[], datetime], instance: str) -> None:
        self._kube = kube
        self._clock = clock
        self._instance = instance
        self._said: dict[Key, set[str]] = {}
        self._logged: set[str] = set()

    def forget(self, key: Key) -> None:
        """The run is gone."""
        self._said.pop(key, None)

    def log(self, key: Key, message: str) -> None:
        """Logs ``message``, which may be true of any number of runs, for the first of them."""
        if message not in self._logged:
            self._logged.add(message)
            logger.warning("%s/%s: %s (said of the first run only)", *key, message)

    async def say(self, metadata: ObjectMeta, reason: str, message: str) -> None:
        """Logs ``message`` and posts it as an Event of ``metadata``'s run. A refused Event holds nothing up."""
        key = metadata.namespace, metadata.name
        said = self._said.setdefault(key, set())
        if message in said:
            return
        said.add(message)
        logger.warning("%s/%s: %s: %s", *key, reason, message)
        event = EventSpec("Warning", reason, "Read", message, _ABOUT)
        try:
            await self._kube.emit_event(build_event(metadata, event, self._clock(), self._instance))
        except KubeError as error:
            logger.warning("%s/%s: event not posted: %s", *key, error)

    async def say_left_out(self, metadata: ObjectMeta, paths: Sequence[str], *, finished: bool) -> None:
        """Fields of a specification that are of a newer version. Of runs that have ended it is said for one of them."""
        if not paths:
            return
        message = f"{', '.join(paths)}: this version of the operator does not know that and leaves it out"
        if finished:
            self.log((metadata.namespace, metadata.name), message)
        else:
            await self.say(metadata, "FieldsLeftOut", message)

    async def say_not_understood(self, metadata: ObjectMeta, mistake: str) -> None:
        """A run that has begun, and that is left as it is."""
        text = "This version of the operator leaves the run as it is: nothing is ended or started"
        remedy = "bring the operator and the CRD to one version (helm upgrade)"
        await self.say(metadata, "NotUnderstood", f"{mistake}. {text}. Remedy: {remedy}")

    async def say_status_refused(self, metadata: ObjectMeta, words: str) -> None:
        """A run that the API server takes no more, so that nothing of it can be put on record."""
        text = "The run cannot be written any more: nothing of it is put on record, and no other attempt follows"
        remedy = (
            "delete this LoRAFineTune and create it again as its CRD takes it now, or have Kubernetes 1.30 or later, "
            "which judges only what a write changes"
        )
        await self.say(metadata, "StatusRefused", f"{text}. Remedy: {remedy}. The API server says: {words}")

    async def say_not_written(self, metadata: ObjectMeta, words: str) -> None:
        """The status of a run may not be written, so that it cannot tell of that itself."""
        text = f"The status of the run may not be written, and nothing follows until it is: {words}".rstrip(".")
        remedy = "see the operator's role, and the webhook or the policy that the message names"
        await self.say(metadata, "StatusNotWritten", f"{text}. Remedy: {remedy}")

    async def say_trainer(self, observed: Observed, plan: Plan, trainer: TrainerPin) -> None:
        """What there is to know of the trainer that an attempt is about to get."""
        attempt = plan.launched_attempt
        if attempt is None:
            return
        metadata, unknown = observed.run.metadata, describe_unknown(observed, plan, trainer)
        if unknown:
            await self.say(metadata, "TrainerUnknown", unknown)
        left_out = to_version(build_run_spec(observed.run, attempt), trainer.run_version).left_out
        if left_out:
            message = f"{', '.join(left_out)}: the run's trainer, {trainer.image}, is too old for that and goes without"
            await self.say(metadata, "FieldsLeftOut", message)
