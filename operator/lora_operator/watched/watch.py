"""The watches, by kopf: handlers that fill the cache and wake a key, and nothing else.

Only ``on.event`` is used: it leaves no finalizers and no annotations on objects, and handlers return None, so kopf
never writes. What kopf does not tell is which objects went away while it had no watch: after a new LIST, objects that
it did not show are looked up one by one (``Confirmations``).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import aiohttp
import kopf
from kopf._cogs.structs.credentials import Vault
from kopf._core.reactor.inventory import ResourceMemories
from kubernetes.aio import client as kubernetes_client

from lora_api import GROUP, VERSION
from lora_operator.kube.client import load_configuration
from lora_operator.names import MANAGER, RUN_LABEL
from lora_operator.objects import Key
from lora_operator.settings import Settings
from lora_operator.watched.cache import Cache, ObjectKey, Resource
from lora_operator.watched.refused import Refused

logger = logging.getLogger(__name__)

Check = Callable[[aiohttp.ClientResponse], Coroutine[None, None, None]]
"""Looks at an answer of the API server, and may raise an error of its own."""

_CREDENTIALS_LIFETIME = timedelta(minutes=10)
_SELECTORS: dict[Resource, tuple[str, str, str]] = {
    Resource.RUNS: (GROUP, VERSION, Resource.RUNS.value),
    Resource.JOBS: ("batch", "v1", Resource.JOBS.value),
    Resource.PODS: ("", "v1", Resource.PODS.value),
    Resource.RUNTIMES: (GROUP, VERSION, Resource.RUNTIMES.value),
}


class _NoDiffBase(kopf.DiffBaseStorage):
    """Compares no object with what it was, which only handlers of another kind than ours ask for.

    kopf makes a deep copy of every object of every event for this: 1.5 ms, where all the rest of it takes 0.3 ms.
    """

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        """Keeps nothing."""


class _NoMemories(ResourceMemories):
    """Keeps no record of objects, which is 1 KB for each and for handlers of another kind than ours too."""

    async def recall(self, raw_body: Any, **options: Any) -> Any:
        """A record that lasts for one event."""
        return await super().recall(raw_body, **{**options, "ephemeral": True})


async def run_watches(
    settings: Settings,
    on_event: Callable[[Resource, str | None, dict[str, Any]], None],
    stop: asyncio.Event,
    refused: Refused | None = None,
) -> None:
    """Passes each watch event to ``on_event`` until ``stop`` is set, a signal comes, or the watches fail for good.

    A namespace of ``settings.namespaces`` that may not be read goes to ``refused``, and the others are watched on.
    """
    check = refused.check if refused is not None and settings.namespaces else None
    vault = Vault()
    try:
        await kopf.operator(
            registry=build_registry(on_event, lambda: load_configuration(settings.kubeconfig), check),
            settings=build_kopf_settings(settings),
            memories=_NoMemories(),
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            # Without it kopf asks for the user's name, and the image's user has none.
            identity=cast("Any", MANAGER),
            stop_flag=stop,
            vault=vault,
        )
    finally:
        await vault.close()  # kopf did so, but what it still looks up when it is ended at its start connects anew


def build_kopf_settings(settings: Settings) -> kopf.OperatorSettings:
    """Settings that make kopf a watcher: no peering, no Events of its own, no look at CRDs and namespaces."""
    ours = kopf.OperatorSettings()
    ours.peering.standalone = True
    ours.posting.enabled = False
    ours.scanning.disabled = True
    # Small pages, and tasks that end soon: what is in memory at once during a long list stays there for good.
    ours.queueing.idle_timeout = 0.02
    ours.watching.chunk_size = 100
    ours.watching.server_timeout = 540
    ours.watching.client_timeout = 600
    ours.watching.connect_timeout = 10
    ours.networking.request_timeout = settings.api_timeout
    ours.process.ultimate_exiting_timeout = 20
    ours.persistence.diffbase_storage = _NoDiffBase()
    for resource in (Resource.JOBS, Resource.PODS):
        ours.watching.label_selectors[_SELECTORS[resource]] = RUN_LABEL
    return ours


def build_registry(
    on_event: Callable[[Resource, str | None, dict[str, Any]], None],
    login: Callable[[], Coroutine[None, None, kubernetes_client.Configuration]],
    check: Check | None = None,
) -> kopf.OperatorRegistry:
    """Handlers that pass each watch event to ``on_event(resource, type, object)``. Type None: from a LIST.

    ``check`` looks at each answer of the API server before kopf does.
    """
    registry = kopf.OperatorRegistry()

    def watch(resource: Resource) -> None:
        @kopf.on.event(*_SELECTORS[resource], registry=registry, id=f"see-{resource}")
        async def see(event: Any, **_: Any) -> None:
            on_event(resource, event["type"], event["object"])

    for resource in Resource:
        watch(resource)

    @kopf.on.login(registry=registry)
    async def login_as_client(**_: Any) -> kopf.ConnectionInfo | kopf.AiohttpSession:
        connection = build_connection(await login(), datetime.now(UTC))
        return connection if check is None else open_session(connection, check)

    return registry


def build_connection(configuration: kubernetes_client.Configuration, now: datetime) -> kopf.ConnectionInfo:
    """The same credentials for kopf as for our own calls. They are read anew from time to time, as tokens rotate."""
    scheme, _, token = str(configuration.api_key.get("BearerToken") or "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        username=configuration.username or None,
        password=configuration.password or None,
        scheme=(scheme or "Bearer") if token else None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        proxy_url=configuration.proxy,
        expiration=now + _CREDENTIALS_LIFETIME if token else None,
    )


def open_session(connection: kopf.ConnectionInfo, check: Check) -> kopf.AiohttpSession:
    """The session that kopf would make for ``connection``, where ``check`` looks at each answer. kopf closes it."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=connection.as_ssl_context()),
        headers=connection.as_http_headers(),
        proxy=connection.proxy_url,
        raise_for_status=check,
    )
    return kopf.AiohttpSession(server=connection.server, expiration=connection.expiration, aiohttp_session=session)


class Confirmations:
    """Finds objects that went away unseen: between two LISTs of kopf, or between our LIST and kopf's first.

    A new LIST of kopf shows every object that exists, as events without a type. The first such event of a resource
    puts all other known objects of it on a list; each one that is shown leaves the list; what is left when no such
    event has come for ``delay`` seconds is looked up by ``check``. Where a LIST is expected and shows nothing at all,
    every object that is known by then is looked up, but for those that the watch has shown.
    """

    def __init__(
        self,
        cache: Cache,
        delay: float,
        check: Callable[[ObjectKey], Coroutine[None, None, None]],
        *,
        by_namespace: bool,
    ) -> None:
        self._cache = cache
        self._delay = delay
        self._check = check
        self._by_namespace = by_namespace
        self._unseen: dict[tuple[Resource, str | None], set[ObjectKey]] = {}
        self._watched: dict[tuple[Resource, str | None], set[ObjectKey]] = {}
        self._timers: dict[tuple[Resource, str | None], asyncio.TimerHandle] = {}
        self._shown_at: dict[tuple[Resource, str | None], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def expect(self, resource: Resource, namespace: str | None) -> None:
        """A LIST of ``resource`` is to come, or comes in."""
        scope = self._scope(resource, namespace)
        loop = asyncio.get_running_loop()
        self._shown_at[scope] = loop.time()
        if scope not in self._timers:
            # A timer, not a sleeping task: kopf waits for tasks when it stops.
            self._timers[scope] = loop.call_later(self._delay, self._finish, scope)

    def see(self, resource: Resource, event_type: str | None, metadata: dict[str, Any]) -> None:
        """Takes an object off the list that an event shows."""
        namespace = metadata.get("namespace", "")
        scope = self._scope(resource, namespace)
        if event_type is None:
            self.expect(resource, namespace)
            if scope not in self._unseen:
                self._unseen[scope] = self._cache.object_keys(*scope)
        key = resource, namespace, metadata["name"]
        if scope in self._unseen:
            self._unseen[scope].discard(key)
        elif scope in self._timers:
            self._watched.setdefault(scope, set()).add(key)

    def _scope(self, resource: Resource, namespace: str | None) -> tuple[Resource, str | None]:
        """What one LIST covers."""
        return resource, namespace if self._by_namespace and resource.namespaced else None

    @property
    def pending(self) -> bool:
        """Whether objects are still waited for."""
        return bool(self._timers)

    async def stop(self) -> None:
        """Cancels what is under way."""
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finish(self, scope: tuple[Resource, str | None]) -> None:
        loop = asyncio.get_running_loop()
        due = self._shown_at[scope] + self._delay
        if due > loop.time():  # a long list takes its time
            self._timers[scope] = loop.call_at(due, self._finish, scope)
            return
        del self._timers[scope]
        missing, watched = self._unseen.pop(scope, None), self._watched.pop(scope, set())
        if missing is None:  # the LIST was empty
            missing = self._cache.object_keys(*scope) - watched
        if missing:
            task = loop.create_task(self._look_up(missing))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look_up(self, missing: set[ObjectKey]) -> None:
        for key in sorted(missing):
            logger.info("%s %s/%s is not in the new list", *key)
            await self._check(key)


def apply_event(cache: Cache, resource: Resource, event_type: str | None, raw: dict[str, Any]) -> list[Key]:
    """Brings ``cache`` up to a watch event; returns the runs to look at: none if it was no news."""
    key = cache.remove(resource, raw) if event_type == "DELETED" else cache.put(resource, raw)
    if resource is Resource.RUNTIMES:
        return cache.runs_waiting_for(raw["metadata"]["name"])
    return [] if key is None else [key]
