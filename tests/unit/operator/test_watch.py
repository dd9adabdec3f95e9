"""Watch events fill the cache; objects that a new LIST does not show are looked up."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import kopf
import pytest
from aiohttp import ClientSession
from kopf._cogs.clients.auth import APIContext
from kopf._cogs.structs.credentials import Vault
from kubernetes.aio.client import Configuration

from lora_operator.settings import Settings
from lora_operator.watched.cache import Cache, ObjectKey, Resource
from lora_operator.watched.watch import (
    Confirmations,
    apply_event,
    build_connection,
    build_kopf_settings,
    build_registry,
    run_watches,
)
from tests.unit.operator.test_cache import KEY, a_raw_runtime, raw

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def test_events_fill_the_cache() -> None:
    cache = Cache()
    assert apply_event(cache, Resource.RUNS, None, raw("tickets", 1)) == [KEY]
    assert apply_event(cache, Resource.RUNS, "MODIFIED", raw("tickets", 1)) == []
    assert apply_event(cache, Resource.RUNS, "DELETED", raw("tickets", 2)) == [KEY]
    assert cache.run_keys() == []


@pytest.mark.parametrize("event_type", [None, "ADDED", "MODIFIED", "DELETED"])
def test_a_runtime_wakes_the_runs_that_wait_for_it(event_type: str | None) -> None:
    cache = Cache()
    for name, runtime in (("tickets", "h100"), ("other", "a100")):
        cache.put(Resource.RUNS, raw(name, 1, spec={"runtimeRef": {"name": runtime}}))
    assert apply_event(cache, Resource.RUNTIMES, event_type, a_raw_runtime("h100", 1)) == [KEY]


def looked_up(cache: Cache, happen: Callable[[Confirmations], None], *, by_namespace: bool = False) -> set[ObjectKey]:
    """What is looked up, each object once, after ``happen``, which leaves something to be confirmed."""
    keys = list[ObjectKey]()

    async def main() -> None:
        async def check(key: ObjectKey) -> None:
            keys.append(key)

        confirmations = Confirmations(cache, 0.01, check, by_namespace=by_namespace)
        happen(confirmations)
        assert confirmations.pending
        async with asyncio.timeout(10):
            while confirmations.pending:  # noqa: ASYNC110  (it tells nobody)
                await asyncio.sleep(0.001)
            await asyncio.gather(*confirmations._tasks)
        await confirmations.stop()

    asyncio.run(main())
    assert len(keys) == len(set(keys))
    return set(keys)


def test_runtimes_are_confirmed_for_the_cluster_also_where_runs_are_by_namespace() -> None:
    cache = Cache()
    cache.put(Resource.RUNTIMES, a_raw_runtime("gone", 1))

    def happen(confirmations: Confirmations) -> None:
        confirmations.expect(Resource.RUNTIMES, None)
        confirmations.see(Resource.RUNTIMES, None, a_raw_runtime("shown", 1)["metadata"])

    assert looked_up(cache, happen, by_namespace=True) == {(Resource.RUNTIMES, "", "gone")}


@pytest.mark.parametrize(("by_namespace", "elsewhere"), [(False, True), (True, False)])
def test_what_a_new_list_does_not_show_is_looked_up(*, by_namespace: bool, elsewhere: bool) -> None:
    """The list of a namespace says nothing about the others; that of the cluster does."""
    cache = Cache()
    for name in ("shown", "changed", "lost"):
        cache.put(Resource.RUNS, raw(name, 1))
    other = raw("other", 1)
    other["metadata"]["namespace"] = "elsewhere"
    cache.put(Resource.RUNS, other)

    def happen(confirmations: Confirmations) -> None:
        confirmations.see(Resource.RUNS, "MODIFIED", raw("lost", 2)["metadata"])
        assert not confirmations.pending, "a change alone says nothing"
        confirmations.see(Resource.RUNS, None, raw("shown", 1)["metadata"])
        confirmations.see(Resource.RUNS, "MODIFIED", raw("changed", 2)["metadata"])

    lost = {(Resource.RUNS, "team", "lost")}
    wanted = lost | {(Resource.RUNS, "elsewhere", "other")} if elsewhere else lost
    assert looked_up(cache, happen, by_namespace=by_namespace) == wanted


@pytest.mark.parametrize("shown", [["shown"], []])
def test_what_was_looked_up_and_went_before_the_first_list_is_looked_up_again(shown: list[str]) -> None:
    """Pods are also fetched on their own: one that kopf's first LIST is too late for would be believed in for ever."""
    cache = Cache()

    def happen(confirmations: Confirmations) -> None:
        confirmations.expect(Resource.RUNS, None)
        cache.put(Resource.RUNS, raw("fetched", 1))
        for name in shown:
            confirmations.see(Resource.RUNS, None, raw(name, 1)["metadata"])

    assert looked_up(cache, happen) == {(Resource.RUNS, "team", "fetched")}


@pytest.mark.parametrize("event_type", ["ADDED", "MODIFIED"])
def test_what_the_watch_shows_after_a_list_without_anything_is_not_looked_up(event_type: str) -> None:
    """On a cluster without a run so far: those that come in the first half a minute would be a call each."""
    cache = Cache()

    def happen(confirmations: Confirmations) -> None:
        confirmations.expect(Resource.RUNS, None)
        for name in ("shown", "lost"):
            cache.put(Resource.RUNS, raw(name, 1))
        confirmations.see(Resource.RUNS, event_type, raw("shown", 1)["metadata"])

    assert looked_up(cache, happen) == {(Resource.RUNS, "team", "lost")}


def test_a_list_that_still_comes_in_is_waited_for() -> None:
    async def main() -> None:
        async def check(key: ObjectKey) -> None:
            raise AssertionError(key)

        cache = Cache()
        for name in ("shown", "not yet"):
            cache.put(Resource.RUNS, raw(name, 1))
        confirmations = Confirmations(cache, 60.0, check, by_namespace=False)
        confirmations.see(Resource.RUNS, None, raw("shown", 1)["metadata"])
        confirmations._finish((Resource.RUNS, None))  # a minute after the list began, and now it was shown
        await asyncio.sleep(0)
        assert confirmations.pending
        await confirmations.stop()

    asyncio.run(main())


def test_nothing_is_looked_up_after_the_stop() -> None:
    async def main() -> None:
        async def check(key: ObjectKey) -> None:
            raise AssertionError(key)

        cache = Cache()
        cache.put(Resource.RUNS, raw("tickets", 1))
        confirmations = Confirmations(cache, 0.0, check, by_namespace=False)
        confirmations.expect(Resource.RUNS, None)
        await confirmations.stop()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_kopf_only_watches() -> None:
    settings = build_kopf_settings(Settings(api_timeout=12.0))
    assert settings.peering.standalone
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    assert settings.networking.request_timeout == 12.0

    async def login() -> Configuration:
        return Configuration()

    registry = build_registry(lambda *_: None, login)
    assert len(registry._watching.get_all_handlers()) == len(Resource)
    assert not registry._changing.get_all_handlers()
    assert not registry._spawning.get_all_handlers()
    assert not registry._indexing.get_all_handlers()


def test_no_connection_of_kopf_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended while it looks for its resources, kopf makes a session after it has closed what it had (1.45.2)."""
    sessions: list[ClientSession] = []

    async def end_at_the_start(*, vault: Vault, **_: Any) -> None:
        await vault.populate({"it": kopf.ConnectionInfo(server="http://127.0.0.1:1")})
        await vault.close()
        async for _, _, context in vault.extended(APIContext, "contexts"):
            sessions.append(context.session)

    monkeypatch.setattr("kopf.operator", end_at_the_start)
    asyncio.run(run_watches(Settings(), lambda *_: None, asyncio.Event()))
    assert [session.closed for session in sessions] == [True]


@pytest.mark.parametrize(
    ("token", "scheme", "value"),
    [(None, None, None), ("secret", "Bearer", "secret"), ("bearer secret", "bearer", "secret")],
)
def test_kopf_uses_the_same_credentials(token: str | None, scheme: str | None, value: str | None) -> None:
    configuration = Configuration(host="https://api")
    configuration.ssl_ca_cert = "/ca"
    if token:
        configuration.api_key["BearerToken"] = token
    connection = build_connection(configuration, NOW)
    assert isinstance(connection, kopf.ConnectionInfo)
    assert (connection.server, connection.ca_path) == ("https://api", "/ca")
    assert (connection.scheme, connection.token) == (scheme, value)
    assert (connection.expiration is not None) == (token is not None)
