"""The first look at the cluster: tried again while that may help, and else a clear end."""

import asyncio

import pytest
from kubernetes.aio.client import Configuration

from lora_operator.cache import Cache
from lora_operator.fill import StartError, fill
from lora_operator.ratelimit import RateLimit
from lora_operator.settings import Settings
from tests.unit.operator.test_cache import raw
from tests.unit.operator.test_kube import Answer, ScriptedClient

EMPTY: Answer = (200, None, {"metadata": {}, "items": []})
RUNS: Answer = (200, None, {"metadata": {}, "items": [raw("tickets", 1)]})


def fill_from(answers: list[Answer]) -> tuple[Cache, ScriptedClient]:
    cache = Cache()

    async def main() -> ScriptedClient:
        client = ScriptedClient(Configuration(host="http://none"), RateLimit(1e6, 1000), 1.0)
        client.answers, client.asked = list(answers), []
        try:
            await fill(cache, client, Settings())
        finally:
            await client.close()
        return client

    return cache, asyncio.run(main())


@pytest.mark.parametrize("status", [410, 429, 500, 503, 504])
def test_a_list_that_fails_is_begun_anew(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr("lora_operator.fill.DELAYS", (0.0, 0.0))
    failure: Answer = (status, None, {"message": "not now"})
    cache, client = fill_from([failure, EMPTY, EMPTY, failure, EMPTY, EMPTY, EMPTY, RUNS])
    assert len(cache.run_keys()) == 1
    assert client.answers == []


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "credentials"), (403, "helm upgrade"), (404, "kubectl apply -f crds"), (400, "health")]
)
def test_a_refusal_that_stays_ends_it_at_once(status: int, advice: str) -> None:
    with pytest.raises(StartError, match=rf"failed with {status}: no; .*{advice}"):
        fill_from([(status, None, {"message": "no"})])


def test_there_is_an_end_to_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_operator.fill.DELAYS", (0.0, 0.0))
    with pytest.raises(StartError, match="500: no;"):
        fill_from([(500, None, {"message": "no"})] * 3)
