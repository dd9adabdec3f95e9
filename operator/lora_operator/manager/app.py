"""The operator as an object: cache, queue, watches and reconciler, started and stopped together."""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from lora_operator.clock import utc_now
from lora_operator.controller.finetunes import FineTunes
from lora_operator.controller.reconcile import Reconciler
from lora_operator.evidence.collector import Collector
from lora_operator.evidence.memory import Memory
from lora_operator.evidence.reader import Reader
from lora_operator.kube.client import KubeClient, load_configuration
from lora_operator.kube.errors import KubeError, NotFoundError
from lora_operator.kube.ratelimit import RateLimit
from lora_operator.metrics import Metrics, Readings
from lora_operator.objects import Key
from lora_operator.settings import Settings
from lora_operator.watched.cache import Cache, ObjectKey, Resource
from lora_operator.watched.fill import fill, fill_namespace, scopes
from lora_operator.watched.refused import FORBIDDEN, Refused
from lora_operator.watched.watch import Confirmations, apply_event, run_watches
from lora_operator.workqueue import PATIENCE, WorkQueue

logger = logging.getLogger(__name__)

STUCK_AFTER = 300.0
"""Seconds after which a look at one run that does not end makes the operator unhealthy."""

FIRST_LOOKS_SECONDS = 30.0
"""Longest time for the first looks before the watches begin, which list all objects again: that takes longer."""

DRAIN_SECONDS = 5.0
"""Seconds that an operator which is to end gives to what it has begun."""


class Operator:
    """One running operator. ``make_client`` and ``clock`` can be replaced by tests."""

    def __init__(
        self,
        settings: Settings,
        make_client: Callable[..., KubeClient] = KubeClient,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.settings = settings
        self.cache = Cache()
        self.refused = Refused(settings.namespaces)
        self.metrics = Metrics(
            Readings(self.cache.runs_by_phase, self.cache.tokens_per_second, self._queue_depth, self.refused.names)
        )
        self.ready = False
        self.drain_seconds = DRAIN_SECONDS
        self._make_client = make_client
        self._clock = clock
        self._queue: WorkQueue[Key] | None = None
        self._confirmations: Confirmations | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Works until ``stop`` is set, or a signal comes, or the watches fail for good."""
        configuration = await load_configuration(self.settings.kubeconfig)
        limit = RateLimit(self.settings.api_qps, self.settings.api_burst)
        kube = self._make_client(configuration, limit, self.settings.api_timeout, self.count_call)
        memory = Memory()
        collector = Collector(Reader(self.cache, kube, self._clock), memory, self._wake_patiently, self._clock)
        runs = FineTunes(
            self.cache, kube, memory, collector, self.settings, self.metrics, self._clock, socket.gethostname()
        )
        self._queue = queue = WorkQueue(self._timed(Reconciler(runs, self._clock), kube), self.settings.concurrency)
        self._confirmations = confirmations = Confirmations(
            self.cache,
            self.settings.confirm_after,
            lambda key: self._check(kube, key),
            by_namespace=bool(self.settings.namespaces),
        )
        # Before kopf, which ends with it all that was begun after it.
        again = asyncio.create_task(self._serve_again(kube, confirmations), name="refused namespaces")
        try:
            await fill(self.cache, kube, self.settings, self.refused)
            collector.start()
            queue.start()
            for key in self.cache.run_keys():
                queue.wake(key, patience=FIRST_LOOKS_SECONDS)
            self.ready = True
            logger.info("ready: %d runs", len(self.cache.run_keys()))
            with suppress(TimeoutError):
                await asyncio.wait_for(queue.caught_up(), FIRST_LOOKS_SECONDS)
            for resource in Resource:
                for namespace in scopes(self.settings, resource):
                    confirmations.expect(resource, namespace)
            await run_watches(self.settings, self._on_event, stop, self.refused)
        finally:
            self.ready = False
            again.cancel()
            await asyncio.wait([again])
            await queue.stop(self.drain_seconds)
            await collector.stop(0.0)
            await confirmations.stop()
            await kube.close()

    def healthy(self) -> str | None:
        """What is wrong with this process, or ``None``."""
        if self._queue is None:
            return None
        now = asyncio.get_running_loop().time()
        stuck = [key for key, since in self._queue.busy_since.items() if now - since > STUCK_AFTER]
        return f"no end of the look at {stuck[0]}" if stuck else None

    def _on_event(self, resource: Resource, event_type: str | None, raw: dict[str, Any]) -> None:
        if self._confirmations is not None:
            self._confirmations.see(resource, event_type, raw["metadata"])
        self._wake(*apply_event(self.cache, resource, event_type, raw))

    def _wake(self, *keys: Key) -> None:
        for key in keys:
            if self._queue is not None:
                self._queue.wake(key)

    def _wake_patiently(self, key: Key) -> None:
        """For a run of which something was read that it waits for: a new run or a pod that failed goes first."""
        if self._queue is not None:
            self._queue.wake(key, patience=PATIENCE)

    async def _check(self, kube: KubeClient, key: ObjectKey) -> None:
        """Looks up an object that a new LIST did not show."""
        try:
            self._wake(*apply_event(self.cache, key[0], None, await kube.fetch_object(*key)))
        except NotFoundError:
            run = self.cache.discard(key)
            self._wake(*([run] if run is not None else []))
        except KubeError as error:
            logger.warning("%s %s/%s: not looked up: %s", *key, error)

    async def _serve_again(self, kube: KubeClient, confirmations: Confirmations) -> None:
        """Reads namespaces that were refused, from time to time, and looks at their runs once that is allowed again."""
        while True:
            await asyncio.sleep(self.refused.retry_seconds)
            for namespace in filter(self.refused.can_be_watched, self.refused.names()):
                try:
                    await fill_namespace(self.cache, kube, namespace)
                except KubeError as error:
                    logger.debug("namespace %s is still not served: %s", namespace, error)
                    continue
                self.refused.serve(namespace)
                for resource in filter(lambda kind: kind.namespaced, Resource):
                    confirmations.expect(resource, namespace)
                self._wake(*(key for key in self.cache.run_keys() if key[0] == namespace))

    async def _find_refused(self, kube: KubeClient, namespace: str) -> None:
        """Whether a refusal is of the whole of ``namespace``: a watch that is open stays allowed for minutes."""
        try:
            await fill_namespace(self.cache, kube, namespace)
        except KubeError as error:
            if error.status == FORBIDDEN:
                self.refused.refuse(namespace, error.message)

    def _timed(self, reconciler: Reconciler[Any, Any], kube: KubeClient) -> Callable[[Key], Any]:
        """``reconcile``, with its duration counted."""

        async def handle(key: Key) -> float | None:
            if key[0] in self.refused:
                return None  # what is known of it may be old, and all that is written is refused
            begin, outcome = asyncio.get_running_loop().time(), "error"
            try:
                again_after = await reconciler.reconcile(key)
                outcome = "ok"
            except KubeError as error:
                if error.status == FORBIDDEN and key[0] in self.settings.namespaces:
                    await self._find_refused(kube, key[0])
                raise
            finally:
                seconds = asyncio.get_running_loop().time() - begin
                self.metrics.reconciles.labels(outcome).observe(seconds)
            return again_after

        return handle

    def count_call(self, verb: str, resource: str, code: int) -> None:
        """Counts a call to the API server."""
        self.metrics.calls.labels(verb, resource, str(code)).inc()

    def _queue_depth(self) -> int:
        return len(self._queue) if self._queue is not None else 0
