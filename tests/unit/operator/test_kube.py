"""The client: patience, errors, rights. What the API server does with its calls is in tests/controlplane."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.aio.client import Configuration

from lora_operator.children.service import build_service
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import ConflictError, KubeError, NameConflictError, NotFoundError
from lora_operator.kube.ratelimit import RateLimit
from lora_operator.kube.rights import RBAC, REVIEW_RBAC
from tests.unit.operator.builders import a_run

ROOT = Path(__file__).parents[3]
Answer = tuple[int, float | None, Any]


class ScriptedClient(KubeClient):
    """Gives the answers of a list, and records what was asked."""

    answers: list[Answer]
    asked: list[tuple[str, str, Any]]

    async def _send(self, method: Any, path: str, query: Any, body: Any, content_type: str, accept: str) -> Any:
        self.asked.append((method, path, body))
        status, retry_after, answer = self.answers.pop(0)
        return status, retry_after, json.dumps(answer).encode()


def with_client(answers: list[Answer], use: Any) -> tuple[Any, ScriptedClient, list[tuple[str, str, int]]]:
    counted: list[tuple[str, str, int]] = []

    async def main() -> tuple[Any, ScriptedClient]:
        client = ScriptedClient(
            Configuration(host="http://none"), RateLimit(1e6, 1000), 1.0, lambda *call: counted.append(call)
        )
        client.answers, client.asked = answers, []
        try:
            return await use(client), client
        finally:
            await client.close()

    result, client = asyncio.run(main())
    return result, client, counted


def get(client: KubeClient) -> Any:
    return client.fetch_object("jobs", "team", "tickets-1")


def test_a_call_is_counted_by_verb_kind_and_code() -> None:
    result, client, counted = with_client([(200, None, {"a": 1})], get)
    assert result == {"a": 1}
    assert client.asked == [("GET", "/apis/batch/v1/namespaces/team/jobs/tickets-1", None)]
    assert counted == [("get", "jobs", 200)]


def test_retry_after_is_honoured() -> None:
    result, _, counted = with_client([(429, 0.01, {}), (503, 0.01, {}), (200, None, {"a": 1})], get)
    assert result == {"a": 1}
    assert [code for _, _, code in counted] == [429, 503, 200]


@pytest.mark.parametrize(
    ("answers", "error", "text"),
    [
        ([(404, None, {"message": "not found"})], NotFoundError, "404: not found"),
        ([(409, None, {"message": "modified"})], ConflictError, "409: modified"),
        ([(403, None, {"message": "forbidden"})], KubeError, "403: forbidden"),
        ([(500, None, "no message")], KubeError, '500: "no message"'),
        ([(429, 0.001, {"message": "slow down"})] * 5, KubeError, "429: slow down"),
    ],
)
def test_errors(answers: list[Answer], error: type[KubeError], text: str) -> None:
    with pytest.raises(error) as raised:
        with_client(list(answers), get)
    assert str(raised.value) == text


def test_an_answer_that_never_comes_is_an_error() -> None:
    async def main() -> None:
        client = KubeClient(Configuration(host="http://127.0.0.1:1"), RateLimit(1e6, 10), 5.0)
        try:
            with pytest.raises(KubeError, match="no answer"):
                await get(client)
        finally:
            await client.close()

    asyncio.run(main())


def test_a_list_is_read_page_by_page() -> None:
    async def use(client: KubeClient) -> list[Any]:
        return [item async for item in client.fetch_list("pods", None)]

    pages: list[Answer] = [
        (200, None, {"metadata": {"continue": "next"}, "items": [1, 2]}),
        (200, None, {"metadata": {}, "items": None}),
    ]
    result, client, _ = with_client(pages, use)
    assert result == [1, 2]
    assert [path for _, path, _ in client.asked] == ["/api/v1/pods"] * 2


OWN = {"uid": "run-uid", "controller": True, "kind": "LoRAFineTune", "name": "tickets"}


@pytest.mark.parametrize(
    ("metadata", "passing"),
    [
        ({"ownerReferences": [OWN]}, None),
        ({}, False),
        ({"ownerReferences": [{**OWN, "kind": "TrainJob", "uid": "x"}]}, False),
        ({"ownerReferences": [{**OWN, "name": "other", "uid": "x"}]}, False),
        ({"ownerReferences": [{**OWN, "uid": "earlier"}]}, True),
        ({"ownerReferences": [OWN], "deletionTimestamp": "2026-11-23T12:00:00Z"}, True),
    ],
    ids=["ours", "nobody's", "another kind's", "another run's", "an earlier run's", "ours, being deleted"],
)
def test_a_child_is_created_or_found_but_never_adopted(metadata: dict[str, Any], passing: bool | None) -> None:
    found = {"metadata": {"name": "tickets-gang", **metadata}}
    run = a_run()
    answers: list[Answer] = [(409, None, {"message": "modified"}), (200, None, found)]

    def use(client: KubeClient) -> Any:
        return client.apply_child(build_service(run), run)

    if passing is None:
        result, client, _ = with_client(answers, use)
        assert result == found
        assert client.asked[0][:2] == ("POST", "/api/v1/namespaces/team/services")
        return
    with pytest.raises(NameConflictError) as raised:
        with_client(answers, use)
    assert raised.value.passing is passing
    assert "Service tickets-gang exists already and belongs to" in str(raised.value)


def test_a_job_that_is_gone_needs_no_deletion() -> None:
    with_client([(404, None, {"message": ""})], lambda client: client.delete_object("jobs", "team", "tickets-1", "uid"))


def test_the_chart_grants_what_the_operator_needs_and_no_more() -> None:
    documents = yaml.safe_load_all((ROOT / "tests/unit/chart/goldens/default.yaml").read_text())
    roles = [document for document in documents if document and document["kind"] == "ClusterRole"]
    granted = {
        (group, resource, verb)
        for role in roles
        if not any(
            word in json.dumps(role["metadata"]) for word in ("aggregate-to", "-view", "-edit", "-metrics-reader")
        )
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    rules = (*RBAC, *REVIEW_RBAC)
    needed = {(rule.group, resource, verb) for rule in rules for resource in rule.resources for verb in rule.verbs}
    assert granted == needed
