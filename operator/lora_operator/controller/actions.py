"""Does what was decided: the calls that create, end and delete things. IO only."""

import logging
from asyncio import gather
from collections.abc import Callable
from datetime import datetime

from lora_api import PLURAL, LoRAFineTune, TrainerPin
from lora_api.finetune import ObjectMeta
from lora_operator.children.assembly import build_children
from lora_operator.children.controlkeys import draw_control_key
from lora_operator.children.job import queue_labels
from lora_operator.evidence.memory import Memory
from lora_operator.kube.client import KubeClient, KubeError, NameConflictError
from lora_operator.lifecycle.finished import list_children
from lora_operator.lifecycle.refusals import needs_answer, permission_of
from lora_operator.names import child_name
from lora_operator.objects import Raw
from lora_operator.settings import RunSettings
from lora_operator.state.observed import Observed
from lora_operator.state.plan import (
    Action,
    DeleteChildren,
    DeleteJob,
    DeleteRun,
    EnqueueJob,
    LaunchAttempt,
    LaunchPreflight,
    Plan,
    StopJob,
)
from lora_operator.state.reports import RefusedChild, hear_denied, hear_refused_child
from lora_operator.watched.cache import Cache, Resource

logger = logging.getLogger(__name__)

FORBIDDEN = 403


class Actor:
    """Does what plans say, and remembers what the API server refused."""

    def __init__(
        self, cache: Cache, kube: KubeClient, memory: Memory, settings: RunSettings, clock: Callable[[], datetime]
    ) -> None:
        self._cache = cache
        self._kube = kube
        self._memory = memory
        self._settings = settings
        self._clock = clock

    async def act(self, observed: Observed, plan: Plan, settings: RunSettings, trainer: TrainerPin) -> bool:
        """Does what ``plan`` says; ``False``: not all of it, and there is to be another decision.

        Calls may take long: nothing more is made of a run that has changed in the meantime, or is gone.
        """
        metadata = observed.run.metadata
        key = metadata.namespace, metadata.name
        for action in plan.actions:
            if isinstance(action, LaunchAttempt | LaunchPreflight):
                if not await self._launch(observed, action, settings, trainer):
                    return False
                continue
            try:
                await self._end(observed, action)
            except KubeError as error:
                if error.status != FORBIDDEN:
                    raise
                logger.warning("%s/%s: may not %s: %s", *key, permission_of(action), error.message)
                self._remember_denial(metadata, action, error.message)
                return False
            self._remember_denial(metadata, action, None)
        return True

    def _remember_denial(self, metadata: ObjectMeta, action: Action, answer: str | None) -> None:
        """Keeps that the operator may not do ``action``, for the next decision; ``None``: it may."""
        now = self._clock()
        self._memory.change(
            (metadata.namespace, metadata.name),
            metadata.uid,
            lambda reports: hear_denied(reports, permission_of(action), answer, now),
        )

    async def _launch(
        self, observed: Observed, launch: LaunchAttempt | LaunchPreflight, settings: RunSettings, trainer: TrainerPin
    ) -> bool:
        """Creates what ``launch`` is made of, group by group; ``False``: something of it was refused."""
        run = observed.run
        control_key = draw_control_key() if isinstance(launch, LaunchAttempt) else None
        for together in build_children(run, launch, settings, trainer, control_key):
            if not self._cache.is_current(run.metadata):
                return False
            calls = (self._kube.apply_child(child, run, expected=_is_kept(child, observed)) for child in together)
            for child, applied in zip(together, await gather(*calls, return_exceptions=True), strict=True):
                if isinstance(applied, KubeError | NameConflictError):
                    return self._remember_refusal(run, child, applied)
                if isinstance(applied, BaseException):
                    raise applied
                if child["kind"] == "Job":
                    self._cache.put(Resource.JOBS, applied)
        return True

    def _remember_refusal(self, run: LoRAFineTune, child: Raw, error: KubeError | NameConflictError) -> bool:
        """Keeps the refusal of ``child``, for the next decision.

        Raises:
            KubeError: ``error``, where another try may settle it.
        """
        metadata, now, conflict = run.metadata, self._clock(), isinstance(error, NameConflictError)
        refused = RefusedChild(
            kind=child["kind"],
            name=child["metadata"]["name"],
            status=error.status if isinstance(error, KubeError) else 0,
            words=error.message if isinstance(error, KubeError) else str(error),
            since=now,
            at=now,
            conflict=conflict,
            passing=isinstance(error, NameConflictError) and error.passing,
        )
        if not needs_answer(refused):
            raise error
        key = metadata.namespace, metadata.name
        self._memory.change(key, metadata.uid, lambda reports: hear_refused_child(reports, refused))
        return False

    async def _end(self, observed: Observed, action: Action) -> None:
        run = observed.run
        match action:
            case DeleteJob(job):
                await self._delete_podgroup(run, job.attempt)
                await self._kube.delete_object("jobs", job.namespace, job.name, job.uid)
                self._cache.remove_job(job)
            case EnqueueJob(job):
                labels = queue_labels(run)
                queued = await self._kube.patch_job_labels(job.namespace, job.name, job.uid, labels)
                self._cache.put(Resource.JOBS, queued)
            case StopJob(job):
                stopped = await self._kube.patch_job_stop(job.namespace, job.name, job.uid)
                self._cache.put(Resource.JOBS, stopped)
            case DeleteChildren():
                await self._delete_children(observed)
            case DeleteRun():
                await self._kube.delete_object(PLURAL, run.metadata.namespace, run.metadata.name, run.metadata.uid)

    async def _delete_children(self, observed: Observed) -> None:
        """Deletes what the run was made of."""
        metadata = observed.run.metadata
        for resource, name in list_children(observed, self._settings):
            await self._kube.delete_child(resource, metadata.namespace, name, metadata.uid)
        for job in observed.all_jobs():
            await self._kube.delete_object("jobs", job.namespace, job.name, job.uid)
            self._cache.remove_job(job)

    async def _delete_podgroup(self, run: LoRAFineTune, attempt: int) -> None:
        """Deletes the PodGroup of an attempt: without its pods it would hold resources that it waits for."""
        scheduler = self._settings.gang_scheduler
        if attempt and scheduler != "none":
            name = child_name(run.metadata.name, attempt)
            await self._kube.delete_child(f"podgroups.{scheduler}", run.metadata.namespace, name, run.metadata.uid)


def _is_kept(child: Raw, observed: Observed) -> bool:
    """Whether ``child`` is there already, unless somebody has deleted it: it is the run's and not an attempt's."""
    if child["kind"] == "Service":
        return bool(observed.run.status.attempt or observed.jobs)
    return child["kind"] == "NetworkPolicy" and observed.has_launched()
