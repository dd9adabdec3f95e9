"""LoRAFineTunes, as ``reconcile`` sees them: what there is of a run, and what is done about it."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from lora_api import ClusterLoRARuntime, LoRAFineTune, LoRAFineTuneStatus, Phase
from lora_api.finetune import ObjectMeta
from lora_api.reading import Reading
from lora_operator.clock import is_due
from lora_operator.controller.actions import Actor
from lora_operator.controller.answers import Answerer
from lora_operator.controller.questions import Leftovers, NamespaceLabels, Question, forgotten_pods, questions
from lora_operator.controller.reconcile import UnreadableError
from lora_operator.controller.remarks import Remarks
from lora_operator.diagnosis.sightings import note_job, note_sightings
from lora_operator.evidence.collector import Collector
from lora_operator.evidence.memory import Memory
from lora_operator.evidence.wants import compute_next_look, compute_wants
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import ConflictError, KubeError, NotFoundError
from lora_operator.lifecycle.decide import decide
from lora_operator.lifecycle.lastwords import await_words
from lora_operator.lifecycle.refusals import face_refusals, is_refusal
from lora_operator.lifecycle.told import keep_words
from lora_operator.metrics import Metrics
from lora_operator.objects import Key, Raw
from lora_operator.policies.placement import begun_by
from lora_operator.settings import RunSettings, Settings
from lora_operator.state.facts import has_started, is_finished
from lora_operator.state.observed import Observed
from lora_operator.state.plan import DeleteJob, Plan
from lora_operator.state.reading import InvalidRunError, check_taken_rules, parse_run, parse_runtime
from lora_operator.state.reports import Reports, forget_attempt, forget_pods
from lora_operator.state.runtimes import resolve
from lora_operator.state.trainers import choose_trainer, keep_trainer
from lora_operator.status.compute import compute_invalid_status, compute_status, is_progress_only
from lora_operator.status.events import EventSpec, build_event, compute_events, describe_left_out
from lora_operator.watched.cache import Cache, Resource
from lora_operator.watched.documents import runtime_name

logger = logging.getLogger(__name__)

INVALID_RETRY = 60.0
FINISHED_RETRY = 600.0
"""Seconds until a run that could not be read is looked up again; the second, one that has ended."""

INVALID = 422


@dataclass(frozen=True)
class Seen:
    """A run, the settings with what it took from its runtime, and the paths of what nobody here knows of it."""

    observed: Observed
    settings: RunSettings
    left_out: tuple[str, ...]

    @property
    def metadata(self) -> ObjectMeta:
        """That of the run."""
        return self.observed.run.metadata


class UnreadableRunError(UnreadableError):
    """A run that is not understood, or whose runtime is not."""

    def __init__(self, error: InvalidRunError) -> None:
        super().__init__(str(error))
        self.error = error


class FineTunes:
    """The kind LoRAFineTune."""

    def __init__(
        self,
        cache: Cache,
        kube: KubeClient,
        memory: Memory,
        collector: Collector,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], datetime],
        instance: str,
    ) -> None:
        self._cache = cache
        self._kube = kube
        self._memory = memory
        self._collector = collector
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._instance = instance
        self._answers = Answerer(cache, kube, memory, clock)
        self._actor = Actor(cache, kube, memory, settings, clock)
        self._remarks = Remarks(kube, clock, instance)

    def forget(self, key: Key) -> None:
        """The run is gone."""
        self._remarks.forget(key)
        self._memory.forget(key)

    def observe(self, key: Key, answers: Mapping[Question, Any]) -> Seen | None:
        """What is there of a run. Jobs of an earlier run of the same name, or with another name, are none of its."""
        raw = self._cache.run(key)
        if raw is None:
            return None
        try:
            reading = parse_run(raw)
            run, left_out = reading.value, reading.left_out
            observed = self._observe(key, run)
            if not observed.has_launched():
                check_taken_rules(left_out, raw)
            if not observed.has_begun():
                runtime = self._find_runtime(raw)
                left_out += runtime.left_out if runtime is not None else ()
                observed = replace(
                    observed,
                    runtime=runtime.value if runtime is not None else None,
                    namespace_labels=answers.get(NamespaceLabels()),
                )
        except InvalidRunError as error:
            raise UnreadableRunError(error) from error
        return Seen(observed, resolve(run, self._settings), left_out)

    def _observe(self, key: Key, run: LoRAFineTune) -> Observed:
        jobs, uid = self._cache.jobs(key), run.metadata.uid
        own = [job for job in jobs if job.owner_uid == uid and job.has_own_name]
        return Observed(
            run=run,
            jobs={job.attempt: job for job in own if not job.preflight},
            preflights={job.preflight: job for job in own if job.preflight},
            pods=tuple(self._cache.pods(key)),
            job_uids=frozenset(job.uid for job in jobs),
            reports=self._memory.get(key, uid),
        )

    def _find_runtime(self, run: Raw) -> Reading[ClusterLoRARuntime] | None:
        """The runtime that ``run`` names, or the default one.

        Raises:
            InvalidRunError: it cannot be read.
        """
        raw = self._cache.runtime(runtime_name(run["spec"]))
        return parse_runtime(raw, run) if raw is not None else None

    def questions(self, seen: Seen, now: datetime) -> Iterable[Question]:
        """What has to be looked up about a run."""
        return questions(seen.observed, now, seen.settings)

    async def answer(self, key: Key, seen: Seen, question: Question) -> Any:
        """Looks it up."""
        answer = await self._answers.answer(key, seen.observed, question)
        if isinstance(question, Leftovers):
            now = self._clock()
            self._memory.change(key, seen.metadata.uid, lambda reports: replace(reports, forgotten_since=now))
        return answer

    def decide(self, seen: Seen, now: datetime) -> Plan:
        """What to do about a run."""
        observed = replace(seen.observed, reports=note_sightings(seen.observed, now))
        plan = face_refusals(observed, decide(observed, now, seen.settings), now, seen.settings)
        return keep_words(observed, await_words(observed, plan, now), now)

    def read_beside(self, seen: Seen, plan: Plan, now: datetime) -> None:
        """Has logs, Events and queues read."""
        run, reports = seen.observed.run, seen.observed.reports
        wants = compute_wants(seen.observed, plan, now, seen.settings)
        self._collector.want((run.metadata.namespace, run.metadata.name), run, reports.epoch, wants)

    async def act(self, seen: Seen, plan: Plan) -> bool:
        """Says what is left out, and does what was decided."""
        observed, run = seen.observed, seen.observed.run
        await self._remarks.say_left_out(run.metadata, seen.left_out, finished=is_finished(run.status))
        trainer = choose_trainer(observed, seen.settings, self._settings.trainer_image)
        await self._remarks.say_trainer(observed, plan, trainer)
        return await self._actor.act(observed, plan, seen.settings, trainer)

    async def record(self, seen: Seen, plan: Plan) -> float | None:
        """Writes the status, and says when the next look is due."""
        key = seen.metadata.namespace, seen.metadata.name
        try:
            again = await self._patch_status(key, seen, plan)
        except KubeError as error:
            return await self._face_refused_status(seen.metadata, error)
        reports = self._memory.get(key, seen.metadata.uid)
        if is_finished(seen.observed.run.status) and not (plan.actions or reports.denied or reports.seen):
            self._memory.forget(key)
        if any(isinstance(action, DeleteJob) for action in plan.actions):
            return 0.0
        waits = [again, compute_next_look(seen.observed, plan, self._settings)]
        return min((seconds for seconds in waits if seconds is not None), default=None)

    async def _patch_status(self, key: Key, seen: Seen, plan: Plan) -> float | None:
        """Writes the status if it changed, and then tells what happened; returns when a held-back write is due."""
        observed, now = seen.observed, self._clock()
        old, metadata = observed.run.status, observed.run.metadata
        trainer = choose_trainer(observed, seen.settings, self._settings.trainer_image)
        self._memory.change(key, metadata.uid, lambda reports: settle(reports, observed, plan, now))
        reports = self._memory.get(key, metadata.uid)
        new = compute_status(observed.run, plan, reports, now, keep_trainer(observed, plan, trainer))
        if new == old or self._kube.to_declared(new) == self._kube.to_declared(old):
            return None
        interval = self._settings.progress_interval
        if is_progress_only(old, new) and not is_due(reports.status_written_at, now, interval):
            written = reports.status_written_at or now
            return interval - (now - written).total_seconds()
        if not await self._write(key, metadata, new):
            return 0.0
        level = logging.DEBUG if is_progress_only(old, new) else logging.INFO
        logger.log(level, "%s/%s: %s, attempt %d: %s", *key, new.phase, new.attempt, new.reason)
        self._memory.change(key, metadata.uid, lambda reports: replace(reports, status_written_at=now))
        self._metrics.count_change(key[0], old, new, now)
        left_out = describe_left_out(observed.run, plan)
        for event in left_out:
            logger.warning("%s/%s: %s", *key, event.note)
        await self._emit_events(metadata, [*left_out, *compute_events(old, new)])
        return 0.0 if plan.is_verdict else None  # a verdict calls for the next step, and no event will

    async def _face_refused_status(self, metadata: ObjectMeta, error: KubeError) -> float:
        """Says in an Event what no status can say: the API server judges the run as a whole, and takes it no more.

        Raises:
            KubeError: it was refused for another reason, which may pass.
        """
        if error.status != INVALID:
            raise error
        await self._remarks.say_status_refused(metadata, error.message)
        return INVALID_RETRY

    async def _write(self, key: Key, metadata: ObjectMeta, status: LoRAFineTuneStatus) -> bool:
        """Writes the status; ``False`` if the run is gone, or is another one than was looked at."""
        try:
            self._cache.put(Resource.RUNS, await self._kube.patch_status(metadata, status))
        except NotFoundError:
            self._cache.forget_run(key)
            return False
        except ConflictError:
            await self._answers.fetch_run(key)
            return False
        except KubeError as error:
            if error.status != INVALID and is_refusal(error.status, error.message):
                await self._remarks.say_not_written(metadata, error.message)
            raise
        return True

    async def leave_alone(self, key: Key, error: UnreadableError) -> float | None:
        """Ends nothing and writes over nothing of a run that is not understood; returns when to look again.

        One that has not begun does not, and its status says why. What there is of another one stays as it is.
        """
        if not isinstance(error, UnreadableRunError):
            raise error
        if await self._answers.fetch_run(key):  # such as what another version of the CRD shows of it, once that is back
            return 0.0
        status, metadata = error.error.status, error.error.metadata
        if status is not None and is_finished(status):
            self._remarks.log(key, f"{error}. The run has ended and stays as it is")
            return FINISHED_RETRY
        if status is None or has_started(status) or any(job.owner_uid == metadata.uid for job in self._cache.jobs(key)):
            await self._remarks.say_not_understood(metadata, str(error))
            return INVALID_RETRY
        new = compute_invalid_status(status, metadata.generation, str(error), self._clock())
        try:
            if self._kube.to_declared(new) != self._kube.to_declared(status):
                if not await self._write(key, metadata, new):
                    return 0.0
                await self._emit_events(metadata, compute_events(status, new))
        except KubeError as refusal:
            return await self._face_refused_status(metadata, refusal)
        return INVALID_RETRY

    async def _emit_events(self, metadata: ObjectMeta, events: Iterable[EventSpec]) -> None:
        """Posts Events. They are for people, so a refused one (a namespace that is going) holds nothing up."""
        for event in events:
            try:
                await self._kube.emit_event(build_event(metadata, event, self._clock(), self._instance))
            except KubeError as error:
                logger.warning("%s/%s: event not posted: %s", metadata.namespace, metadata.name, error)


def settle(reports: Reports, observed: Observed, plan: Plan, now: datetime) -> Reports:
    """What is remembered once ``plan`` is done.

    A new attempt starts with no reports of the one before, and new pods with none of those taken back.
    """
    if plan.launch is not None or plan.is_verdict:
        return forget_attempt(reports)
    if plan.phase == Phase.QUEUED:
        return note_job(observed, forget_pods(reports), now)
    if reports.refusal and not any(map(observed.is_short_of_pods, observed.all_jobs())):
        reports = replace(reports, refusal=None)
    reports = note_sightings(replace(observed, reports=reports), now)
    job = observed.live_job()
    if reports.queue_read_at is not None and not (job is not None and job.suspended):
        reports = replace(reports, queue=None, queue_read_at=None, queue_changed_at=None)
    if plan.notes.words_of:  # the verdict is known, and is to be the same once they are read
        return replace(reports, awaiting_since=reports.awaiting_since or now)
    return replace(
        reports,
        failing_since=(reports.failing_since or now) if plan.notes.failing else None,
        failing_with=(reports.failing_with or begun_by(observed)) if plan.notes.failing else None,
        short_of_room_since=(reports.short_of_room_since or now) if plan.notes.short_of_room else None,
        awaiting_since=None,
        forgotten_since=(reports.forgotten_since or now) if forgotten_pods(observed) else None,
    )
