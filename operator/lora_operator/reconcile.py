"""The operator on one screen: what happens each time something about a run may have changed.

    watch event -> wake(key) -> queue -> reconcile(key)

``reconcile`` looks at the whole run every time and needs no memory of what happened before (level-triggered). A
function that starts with fetch_, apply_, patch_, delete_ or emit_ talks to the API server; parse_, build_, decide_,
compute_ and diagnose_ are pure. An operator that is killed between any two calls leaves a state from which the next one
goes on.
"""

import logging
from asyncio import gather
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime

from lora_api import (
    PLURAL,
    ClusterLoRARuntime,
    LoRAFineTune,
    LoRAFineTuneStatus,
    Phase,
    TrainerPin,
)
from lora_api.finetune import ObjectMeta
from lora_api.reading import Reading
from lora_operator.admission import asks_for_namespace
from lora_operator.cache import Cache, Resource
from lora_operator.children.assembly import build_children
from lora_operator.children.names import child_name
from lora_operator.controlkeys import ControlKeys
from lora_operator.diagnose import PEER_SILENT
from lora_operator.events import EventSpec, build_event, compute_events, describe_left_out
from lora_operator.finished import list_children
from lora_operator.follow import (
    compute_next_look,
    forgotten_pods,
    lacks_preflight,
    unseen_ends,
    wants_log,
    wants_queue,
    wants_refusal,
)
from lora_operator.kube import ConflictError, KubeClient, KubeError, NameConflictError, NotFoundError
from lora_operator.kueue import fetch_queue_report
from lora_operator.lifecycle import decide
from lora_operator.logs import current_run
from lora_operator.lookups import Lookups
from lora_operator.metrics import Metrics
from lora_operator.observed import (
    RESTORE_INTERVAL,
    Observed,
    Reports,
    forget_pods,
    has_started,
    hear,
    hear_queue,
    hear_refusal,
    is_finished,
)
from lora_operator.obstacles import diagnose_refusal
from lora_operator.parse import InvalidRunError, check_taken_rules, parse_run, parse_runtime
from lora_operator.plan import OUTDATED, Plan
from lora_operator.podlogs import PodLogs
from lora_operator.progress import (
    compute_progress,
    compute_stage,
    describe_last,
    find_first_step,
    is_due,
    keep_believable,
    parse_progress,
)
from lora_operator.remarks import Remarks
from lora_operator.runtimes import resolve, runtime_name
from lora_operator.settings import Settings
from lora_operator.status import compute_invalid_status, compute_status, is_progress_only
from lora_operator.trainers import choose_trainer, keep_trainer
from lora_operator.verdicts import PREFLIGHT, decide_conflict, decide_no_podgroups, decide_obstructed
from lora_operator.views import JobView, Key, Raw

logger = logging.getLogger(__name__)

PROGRESS_LINES = 200
INVALID_RETRY = 60.0
FINISHED_RETRY = 600.0
"""Seconds until a run that could not be read is looked up again; the second, one that has ended."""


class Reconciler:
    """Brings one run at a time to where it should be."""

    def __init__(
        self,
        cache: Cache,
        kube: KubeClient,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], datetime],
        instance: str,
    ) -> None:
        self._cache = cache
        self._kube = kube
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._instance = instance
        self._lookups = Lookups(cache, kube)
        self._logs = PodLogs(cache, kube)
        self._remarks = Remarks(kube, clock, instance)
        self._keys = ControlKeys()
        self._reports: dict[Key, Reports] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Looks at one run; returns the seconds after which to look again without an event, or ``None``."""
        current_run.set("/".join(key))
        raw = self._cache.run(key)
        if raw is None:
            for memory in (self._keys, self._remarks):
                memory.forget(key)
            self._reports.pop(key, None)
            return None
        try:
            reading = parse_run(raw)
            run, left_out = reading.value, reading.left_out
            observed = self._observe(key, run)
            if not observed.has_launched():
                check_taken_rules(left_out, raw)
            if not observed.has_begun():
                observed, of_runtime = await self._look_at_runtime(key, raw, observed)
                left_out += of_runtime
        except InvalidRunError as error:
            return await self._leave_alone(key, error)
        await self._remarks.say_left_out(run.metadata, left_out, finished=is_finished(run.status))
        settings = resolve(run, self._settings)
        if await self._lookups.find_job(key, observed):
            observed = self._observe(key, run)
        job = unseen_ends(observed)
        if job is not None:
            observed = await self._look_at_pods(key, observed, job)
        observed = await self._confirm_leftovers(key, observed)
        if lacks_preflight(observed, settings) and not await self._lookups.is_current(key, run):
            return 0.0
        observed = await self._fetch_reports(key, observed)
        now, job = self._clock(), observed.live_job()
        plan = decide(observed, now, settings)
        if job is not None and plan.failure is not None and plan.failure.reason == PEER_SILENT:
            observed = await self._look_at_pods(key, observed, job)  # the watch may be late
            plan = decide(observed, now, settings)
        trainer = choose_trainer(observed, settings, self._settings.trainer_image)
        await self._remarks.say_trainer(observed, plan, trainer)
        plan = await self._apply(observed, plan, settings, trainer)
        wait = await self._patch_status(key, observed, plan, keep_trainer(observed, plan, trainer))
        if is_finished(run.status):
            self._keys.forget(key)
            self._reports.pop(key, None)
        waits = [wait, compute_next_look(observed, plan, self._settings)]
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _observe(self, key: Key, run: LoRAFineTune) -> Observed:
        """What is there. Jobs of an earlier run of the same name, or with another name, are none of this run's."""
        jobs, uid = self._cache.jobs(key), run.metadata.uid
        own = [job for job in jobs if job.owner_uid == uid and job.has_own_name]
        reports = self._reports.get(key)
        return Observed(
            run=run,
            jobs={job.attempt: job for job in own if not job.preflight},
            preflights={job.preflight: job for job in own if job.preflight},
            pods=tuple(self._cache.pods(key)),
            job_uids=frozenset(job.uid for job in jobs),
            reports=reports if reports and reports.run_uid == uid else Reports(run_uid=uid),
        )

    async def _look_at_runtime(self, key: Key, raw: Raw, observed: Observed) -> tuple[Observed, tuple[str, ...]]:
        """With the runtime that the run is about to take, and what that asks about its namespace.

        Also returns the paths of what nobody here knows of the runtime.

        Raises:
            InvalidRunError: the runtime cannot be read.
        """
        reading = self._find_runtime(raw)
        if reading is None:
            return observed, ()
        labels = await self._lookups.fetch_labels(key[0]) if asks_for_namespace(reading.value) else None
        return replace(observed, runtime=reading.value, namespace_labels=labels), reading.left_out

    def _find_runtime(self, run: Raw) -> Reading[ClusterLoRARuntime] | None:
        """The runtime that ``run`` names, or the default one.

        Raises:
            InvalidRunError: it cannot be read.
        """
        raw = self._cache.runtime(runtime_name(run["spec"]))
        return parse_runtime(raw, run) if raw is not None else None

    async def _fetch_reports(self, key: Key, observed: Observed) -> Observed:
        """Reads, seldom and only while it matters, what no watch shows: rank 0's log, and why pods are missing."""
        now, reports = self._clock(), observed.reports
        pod = wants_log(observed, now, self._settings)
        if pod is not None:
            log = await self._logs.fetch(pod, PROGRESS_LINES)
            read_at = self._clock()  # much later than now, where the call hung or this process stood still
            said = parse_progress(log or "")
            lines = keep_believable(said, reports.first_step)
            if len(lines) < len(said):
                logger.warning("pod %s tells of %d steps that cannot be", pod.name, len(said) - len(lines))
            first_step = find_first_step(reports.first_step, lines)
            reports = replace(
                hear(reports, None if log is None else describe_last(lines), read_at),
                stage=compute_stage(lines, reports.stage),
                progress=compute_progress(
                    reports.progress or observed.run.status.progress,
                    lines,
                    logging_steps=observed.run.spec.training.logging_steps,
                    first=first_step,
                    read_at=read_at,
                ) if lines else reports.progress,
                first_step=first_step,
                log_read_at=now,
                log_read_to_end=pod.ended is not None,
            )  # fmt: skip
        job = wants_refusal(observed, now, self._settings)
        if job is not None:
            reports = hear_refusal(reports, await self._kube.fetch_refusal(job.namespace, job.name, job.uid), now)
        elif reports.refusal and not any(map(observed.is_short_of_pods, observed.all_jobs())):
            reports = replace(reports, refusal=None)
        reports = await self._fetch_queue(replace(observed, reports=reports), now)
        self._reports[key] = reports
        return replace(observed, reports=reports)

    async def _fetch_queue(self, observed: Observed, now: datetime) -> Reports:
        """Asks Kueue, seldom, why a suspended Job waits; what it said of one that runs again is of no interest."""
        job, reports = wants_queue(observed, now, self._settings), observed.reports
        if job is not None:
            return hear_queue(reports, await fetch_queue_report(self._kube, job) or reports.queue, now)
        live = observed.live_job()
        suspended = live is not None and live.suspended
        return reports if suspended or reports.queue_read_at is None else hear_queue(reports, None, None)

    async def _apply(self, observed: Observed, plan: Plan, settings: Settings, trainer: TrainerPin) -> Plan:
        """Makes the children what ``plan`` says; returns the plan, or what to do instead where a name is taken.

        Calls may take long: nothing more is made of a run that has changed in the meantime, or is gone.
        """
        run = observed.run
        try:
            attempt = plan.launch or (plan.restore.attempt if plan.restore else PREFLIGHT)
            control_key = None if attempt == PREFLIGHT else self._keys.of(run, attempt)
            for together in build_children(run, plan, settings, trainer, control_key):
                if not self._cache.is_current(run.metadata):
                    return OUTDATED
                calls = (self._kube.apply_child(child, run, expected=_is_kept(child, observed)) for child in together)
                for child, applied in zip(together, await gather(*calls, return_exceptions=True), strict=True):
                    if isinstance(applied, KubeError):
                        return self._decide_refused(observed, plan, child, applied, settings)
                    if isinstance(applied, BaseException):
                        raise applied
                    if child["kind"] == "Job":
                        self._cache.put(Resource.JOBS, applied)
        except NameConflictError as conflict:
            restored = plan.restore.attempt if plan.restore else PREFLIGHT
            attempt, now = plan.launch or restored, self._clock()
            return decide_conflict(observed, attempt, str(conflict), now, settings, passing=conflict.passing)
        if plan.delete is not None:
            await self._delete_podgroup(run, plan.delete.attempt)
            await self._kube.delete_object("jobs", plan.delete.namespace, plan.delete.name, plan.delete.uid)
            self._cache.remove_job(plan.delete)
            return replace(plan, requeue_after=0.0)
        if plan.stop is not None:
            job = await self._kube.patch_job_stop(plan.stop.namespace, plan.stop.name, plan.stop.uid)
            self._cache.put(Resource.JOBS, job)
        if plan.clean_up:
            await self._delete_children(observed)
        if plan.delete_run:
            await self._kube.delete_object(PLURAL, run.metadata.namespace, run.metadata.name, run.metadata.uid)
        return plan

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

    def _decide_refused(self, observed: Observed, plan: Plan, child: Raw, error: KubeError, settings: Settings) -> Plan:
        """What to do instead, now that ``child`` is refused.

        Raises:
            KubeError: ``error``, where another try may settle it.
        """
        kind, name, now = child["kind"], child["metadata"]["name"], self._clock()
        if kind == "PodGroup" and isinstance(error, NotFoundError):
            return decide_no_podgroups(observed, settings)
        obstacle = diagnose_refusal(kind, name, error.status, error.message, observed.reports.obstructed_since or now)
        if obstacle is None:
            raise error
        if plan.restore is not None:  # the pods may do without it
            logger.warning("%s/%s: %s", observed.run.metadata.namespace, observed.run.metadata.name, obstacle.message)
            return replace(plan, requeue_after=RESTORE_INTERVAL)
        return decide_obstructed(observed, plan.launch or PREFLIGHT, obstacle, now, settings)

    async def _patch_status(self, key: Key, observed: Observed, plan: Plan, trainer: TrainerPin | None) -> float | None:
        """Writes the status if it changed, and then tells what happened; returns when a held-back write is due."""
        now, old = self._clock(), observed.run.status
        if plan.failure is not None:
            plan = replace(plan, failure=await self._logs.add_last_words(observed, plan.failure))
        reports = self._compute_reports(observed.reports, plan, now)
        self._reports[key] = reports
        new = compute_status(observed.run, plan, reports, now, trainer)
        if new == old or self._kube.to_declared(new) == self._kube.to_declared(old):
            return None
        interval = self._settings.progress_interval
        if is_progress_only(old, new) and not is_due(reports.status_written_at, now, interval):
            written = reports.status_written_at or now
            return interval - (now - written).total_seconds()
        if not await self._write(key, observed.run.metadata, new):
            return 0.0
        self._reports[key] = replace(reports, status_written_at=now)
        self._metrics.count_change(key[0], old, new, now)
        launched = plan.launch is not None or plan.launch_preflight is not None
        left_out = describe_left_out(observed.run) if launched else []
        for event in left_out:
            logger.warning("%s/%s: %s", *key, event.note)
        await self._emit_events(observed.run.metadata, [*left_out, *compute_events(old, new)])
        # A verdict calls for the next step, and no event will.
        verdict = plan.failure or plan.passed or plan.ended or plan.suspended is not None
        return 0.0 if verdict else None

    def _compute_reports(self, reports: Reports, plan: Plan, now: datetime) -> Reports:
        """A new attempt starts with no reports of the one before, and new pods with none of those taken back."""
        if plan.launch is not None or plan.failure is not None or plan.suspended is not None or plan.passed is not None:
            return Reports(
                run_uid=reports.run_uid, progress=reports.progress, status_written_at=reports.status_written_at
            )
        if plan.phase == Phase.QUEUED:
            return forget_pods(reports)
        if plan.restore is not None:
            reports = replace(reports, restored_at=now)
        return replace(
            reports,
            failing_since=(reports.failing_since or now) if plan.failing else None,
            obstructed_since=(reports.obstructed_since or now) if plan.obstructed else None,
        )

    async def _write(self, key: Key, metadata: ObjectMeta, status: LoRAFineTuneStatus) -> bool:
        """Writes the status; ``False`` if the run is gone, or is another one than was looked at."""
        try:
            self._cache.put(Resource.RUNS, await self._kube.patch_status(metadata, status))
        except NotFoundError:
            self._cache.forget_run(key)
            return False
        except ConflictError:
            await self._lookups.fetch_run(key)
            return False
        logger.info("%s/%s: %s, attempt %d: %s", *key, status.phase, status.attempt, status.reason)
        return True

    async def _look_at_pods(self, key: Key, observed: Observed, job: JobView) -> Observed:
        await self._lookups.fetch_pods(key, observed, job)
        return self._observe(key, observed.run)

    async def _confirm_leftovers(self, key: Key, observed: Observed) -> Observed:
        """Looks up, once they have been waited for, pods that hold up the next attempt: no watch may have told."""
        pods, now, since = forgotten_pods(observed), self._clock(), observed.reports.forgotten_since
        if pods and since is not None and is_due(since, now, self._settings.failure_grace):
            await self._lookups.fetch_leftovers(key, pods)
            seen = self._observe(key, observed.run)
            seen = replace(seen, runtime=observed.runtime, namespace_labels=observed.namespace_labels)
            observed, since = seen, now
        reports = replace(observed.reports, forgotten_since=(since or now) if pods else None)
        self._reports[key] = reports
        return replace(observed, reports=reports)

    async def _leave_alone(self, key: Key, error: InvalidRunError) -> float:
        """Ends nothing and writes over nothing of a run that is not understood; returns when to look again.

        One that has not begun does not, and its status says why. What there is of another one stays as it is.
        """
        if await self._lookups.fetch_run(key):  # such as what another version of the CRD shows of it, once that is back
            return 0.0
        status, metadata = error.status, error.metadata
        if status is not None and is_finished(status):
            self._remarks.log(key, f"{error}. The run has ended and stays as it is")
            return FINISHED_RETRY
        if status is None or has_started(status) or any(job.owner_uid == metadata.uid for job in self._cache.jobs(key)):
            await self._remarks.say_not_understood(metadata, str(error))
            return INVALID_RETRY
        new = compute_invalid_status(status, metadata.generation, str(error), self._clock())
        if self._kube.to_declared(new) != self._kube.to_declared(status):
            if not await self._write(key, metadata, new):
                return 0.0
            await self._emit_events(metadata, compute_events(status, new))
        return INVALID_RETRY

    async def _emit_events(self, metadata: ObjectMeta, events: Iterable[EventSpec]) -> None:
        """Posts Events. They are for people, so a refused one (a namespace that is going) holds nothing up."""
        for event in events:
            try:
                await self._kube.emit_event(build_event(metadata, event, self._clock(), self._instance))
            except KubeError as error:
                logger.warning("%s/%s: event not posted: %s", metadata.namespace, metadata.name, error)


def _is_kept(child: Raw, observed: Observed) -> bool:
    """Whether ``child`` is there already, unless somebody has deleted it: it is the run's and not an attempt's."""
    return child["kind"] == "NetworkPolicy" and observed.has_launched()
