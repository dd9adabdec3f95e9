"""The first look at the cluster: tried again while that may help, and else a clear end."""

import asyncio
import json
from typing import Any

import pytest
from kubernetes.aio.client import Configuration

from lora_operator.kube.client import KubeClient
from lora_operator.kube.ratelimit import RateLimit
from lora_operator.settings import Settings
from lora_operator.watched.cache import Cache
from lora_operator.watched.fill import StartError, fill
from lora_operator.watched.refused import Refused
from tests.unit.operator.test_cache import KEY, raw


class FailingClient(KubeClient):
    """There is one run. Each status of ``failures`` is the answer to one LIST of Jobs."""

    failures: list[int]

    async def _send(self, method: Any, path: str, *_: Any) -> Any:
        if path.endswith("/jobs") and self.failures:
            return self.failures.pop(0), None, b'{"message": "no"}'
        items = [raw("tickets", 1)] if path.endswith("/lorafinetunes") else []
        return 200, None, json.dumps({"metadata": {}, "items": items}).encode()


class SlowClient(FailingClient):
    """The answer to a LIST of Jobs is a refusal, and that to one of pods comes later."""

    answered = False

    async def _send(self, method: Any, path: str, *more: Any) -> Any:
        if path.endswith("/pods"):
            await asyncio.sleep(0.05)
            self.answered = True
        return await super()._send(method, path, *more)


def test_no_other_list_is_cut_off_by_one_that_is_refused() -> None:
    async def main() -> None:
        client = SlowClient(Configuration(host="http://none"), RateLimit(1e6, 1000), 1.0)
        client.failures = [403]
        with pytest.raises(StartError):
            await fill(Cache(), client, Settings())
        assert client.answered
        await client.close()

    asyncio.run(main())


def fill_with(failures: list[int]) -> Cache:
    cache = Cache()

    async def main() -> None:
        client = FailingClient(Configuration(host="http://none"), RateLimit(1e6, 1000), 1.0)
        client.failures = failures
        try:
            await fill(cache, client, Settings())
        finally:
            await client.close()

    asyncio.run(main())
    return cache


@pytest.mark.parametrize("status", [410, 429, 500, 503, 504])
def test_a_list_that_fails_is_begun_anew(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr("lora_operator.watched.fill.DELAYS", (0.0, 0.0))
    failures = [status, status]
    assert fill_with(failures).run_keys() == [KEY]
    assert failures == []


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "credentials"), (403, "helm upgrade"), (404, "kubectl apply -f crds"), (400, "health")]
)
def test_a_refusal_that_stays_ends_it_at_once(status: int, advice: str) -> None:
    with pytest.raises(StartError, match=rf"failed with {status}: no; .*{advice}"):
        fill_with([status])


def test_there_is_an_end_to_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_operator.watched.fill.DELAYS", (0.0, 0.0))
    with pytest.raises(StartError, match="500: no;"):
        fill_with([500] * 3)


class NamespacesClient(KubeClient):
    """Nothing is there; what lies in ``forbidden`` may not be listed."""

    forbidden: tuple[str, ...]
    status = 403

    async def _send(self, method: Any, path: str, *_: Any) -> Any:
        if any(f"/namespaces/{namespace}/" in path for namespace in self.forbidden):
            return self.status, None, b'{"message": "jobs is forbidden"}'
        return 200, None, b'{"metadata": {}, "items": []}'


def refused_of(forbidden: tuple[str, ...], status: int = 403) -> list[str]:
    settings = Settings(namespaces=("a", "b"))
    refused = Refused(settings.namespaces)

    async def main() -> None:
        client = NamespacesClient(Configuration(host="http://none"), RateLimit(1e6, 1000), 1.0)
        client.forbidden, client.status = forbidden, status
        try:
            await fill(Cache(), client, settings, refused)
        finally:
            await client.close()

    asyncio.run(main())
    return refused.names()


def test_a_namespace_that_may_not_be_read_takes_no_other_down() -> None:
    assert refused_of(()) == []
    assert refused_of(("b",)) == ["b"]


@pytest.mark.parametrize(("forbidden", "status"), [(("a", "b"), 403), (("b",), 401), (("b",), 404)])
def test_what_is_wrong_with_all_of_them_is_an_end(forbidden: tuple[str, ...], status: int) -> None:
    with pytest.raises(StartError, match=f"{status}: jobs is forbidden"):
        refused_of(forbidden, status)
