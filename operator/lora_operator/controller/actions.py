"""Does what was decided: the calls that create, end and delete things. IO only."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from lora_api import PLURAL, LoRAFineTune, TrainerPin
from lora_api.finetune import ObjectMeta
from lora_operator.children.assembly import build_children
from lora_operator.children.controlkeys import draw_control_key
from lora_operator.children.job import queue_labels
from lora_operator.controller.lanes import HURRY, Lanes
from lora_operator.evidence.memory import Memory
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import KubeError, NameConflictError, NoAnswerError
from lora_operator.kube.patience import within
from lora_operator.lifecycle.cleanup import list_children
from lora_operator.lifecycle.refusals import DELETE_JOBS, DELETE_RUN, PATCH_JOBS, is_refusal, needs_answer
from lora_operator.names import child_name
from lora_operator.objects import Raw
from lora_operator.policies.nodes import forget_old
from lora_operator.settings import RunSettings, Settings
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
from lora_operator.state.reports import RefusedChild, hear_denied, hear_no_room, hear_refused_child
from lora_operator.watched.cache import Cache, Resource
from lora_operator.watched.views import JobView

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Actor:
    """Does what plans say, and remembers what the API server refused."""

    def __init__(
        self, cache: Cache, kube: KubeClient, memory: Memory, settings: Settings, clock: Callable[[], datetime]
    ) -> None:
        self._cache = cache
        self._kube = kube
        self._memory = memory
        self._settings = settings
        self._clock = clock
        self._lanes = Lanes(settings.concurrency)

    async def act(self, observed: Observed, plan: Plan, settings: RunSettings, trainer: TrainerPin) -> bool:
        """Does what ``plan`` says; ``False``: not all of it, and there is to be another decision.

        Calls may take long: nothing more is made of a run that has changed in the meantime, or is gone.
        """
        for action in plan.actions:
            if isinstance(action, LaunchAttempt | LaunchPreflight):
                if not await self._launch(observed, action, settings, trainer):
                    return False
                continue
            if not await self._end(observed, action):
                return False
        return True

    async def _try(self, metadata: ObjectMeta, permission: str, call: Awaitable[T]) -> tuple[bool, T | None]:
        """Makes ``call``, and keeps for the next decision that it is refused, or that it is not.

        Raises:
            KubeError: an error that passes.
        """
        key, now = (metadata.namespace, metadata.name), self._clock()
        before = self._memory.get(key, metadata.uid).denied.get(permission)
        try:
            with within(min(self._settings.api_timeout, HURRY * 2.0 ** min(before.times if before else 0, 10))):
                answer = await call
        except KubeError as error:
            if not (is_refusal(error.status, error.message) or isinstance(error, NoAnswerError)):
                raise
            status, words = error.status, error.message
            logger.warning("%s/%s: may not %s: %s", *key, permission, error)
            self._memory.change(key, metadata.uid, lambda old: hear_denied(old, permission, words, now, status))
            return False, None
        self._memory.change(key, metadata.uid, lambda old: hear_denied(old, permission, None, now))
        return True, answer

    async def _launch(
        self, observed: Observed, launch: LaunchAttempt | LaunchPreflight, settings: RunSettings, trainer: TrainerPin
    ) -> bool:
        """Creates what ``launch`` is made of; ``False``: something of it was refused, or there is no room now."""
        metadata, loop = observed.run.metadata, asyncio.get_running_loop()
        namespace, begin, answered = metadata.namespace, loop.time(), True
        if not self._lanes.enter(namespace):
            now = self._clock()
            self._memory.change((namespace, metadata.name), metadata.uid, lambda reports: hear_no_room(reports, now))
            return False
        try:
            with within(self._lanes.patience(namespace)):
                return await self._create(observed, launch, settings, trainer)
        except NoAnswerError as error:
            answered, words, now = False, error.message, self._clock()
            logger.warning("%s/%s: %s", namespace, metadata.name, words)
            self._memory.change((namespace, metadata.name), metadata.uid, lambda old: hear_no_room(old, now))
            return False
        finally:
            self._lanes.leave(namespace, loop.time() - begin, answered=answered)

    async def _create(
        self, observed: Observed, launch: LaunchAttempt | LaunchPreflight, settings: RunSettings, trainer: TrainerPin
    ) -> bool:
        """Creates what ``launch`` is made of, group by group; ``False``: something of it was refused.

        Raises:
            NoAnswerError: the API server takes long.
        """
        run = observed.run
        control_key = draw_control_key() if isinstance(launch, LaunchAttempt) else None
        for together in build_children(forget_old(run, self._clock()), launch, settings, trainer, control_key):
            if not self._cache.is_current(run.metadata):
                return False
            calls = (self._kube.apply_child(child, run, expected=_is_kept(child, observed)) for child in together)
            for child, applied in zip(together, await asyncio.gather(*calls, return_exceptions=True), strict=True):
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

    async def _end(self, observed: Observed, action: Action) -> bool:
        """Does ``action``; ``False``: it is refused, or a part of it."""
        metadata = observed.run.metadata
        match action:
            case DeleteJob(job):
                await self._delete_podgroup(observed.run, job.attempt)
                return await self._delete_job(metadata, job)
            case EnqueueJob(job):
                labels = queue_labels(observed.run)
                call = self._kube.patch_job_labels(job.namespace, job.name, job.uid, labels)
                return await self._patch_job(metadata, call)
            case StopJob(job):
                return await self._patch_job(metadata, self._kube.patch_job_stop(job.namespace, job.name, job.uid))
            case DeleteChildren():
                return await self._delete_children(observed)
            case DeleteRun():
                deleted = self._kube.delete_object(PLURAL, metadata.namespace, metadata.name, metadata.uid)
                return (await self._try(metadata, DELETE_RUN, deleted))[0]
        return True

    async def _patch_job(self, metadata: ObjectMeta, call: Awaitable[Raw]) -> bool:
        done, patched = await self._try(metadata, PATCH_JOBS, call)
        if patched is not None:
            self._cache.put(Resource.JOBS, patched)
        return done

    async def _delete_job(self, metadata: ObjectMeta, job: JobView) -> bool:
        call = self._kube.delete_object("jobs", job.namespace, job.name, job.uid)
        done, _ = await self._try(metadata, DELETE_JOBS, call)
        if done:
            self._cache.remove_job(job)
        return done

    async def _delete_children(self, observed: Observed) -> bool:
        """Deletes what the run was made of: all that may be deleted, whatever may not."""
        metadata = observed.run.metadata
        refused = set[str]()
        for resource, name in list_children(observed, self._settings):
            kind = resource.partition(".")[0]
            if kind not in refused and not await self._delete_child(metadata, resource, name):
                refused.add(kind)
        for job in observed.all_jobs():
            if "jobs" not in refused and not await self._delete_job(metadata, job):
                refused.add("jobs")
        return not refused

    async def _delete_child(self, metadata: ObjectMeta, resource: str, name: str) -> bool:
        call = self._kube.delete_child(resource, metadata.namespace, name, metadata.uid)
        return (await self._try(metadata, f"delete {resource.partition('.')[0]}", call))[0]

    async def _delete_podgroup(self, run: LoRAFineTune, attempt: int) -> None:
        """Deletes the PodGroup of an attempt: without its pods it would hold resources that it waits for."""
        scheduler = self._settings.gang_scheduler
        if attempt and scheduler != "none":
            await self._delete_child(run.metadata, f"podgroups.{scheduler}", child_name(run.metadata.name, attempt))


def _is_kept(child: Raw, observed: Observed) -> bool:
    """Whether ``child`` is there already, unless somebody has deleted it: it is the run's and not an attempt's."""
    if child["kind"] == "Service":
        return bool(observed.run.status.attempt or observed.jobs)
    return child["kind"] == "NetworkPolicy" and observed.has_launched()
