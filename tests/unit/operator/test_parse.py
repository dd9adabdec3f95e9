"""A specification that cannot be read is refused with the field's path."""

from typing import Any

import pytest

from lora_operator.parse import InvalidRunError, parse_run, parse_runtime
from tests.unit.operator.builders import a_run


def raw(**changes: Any) -> dict[str, Any]:
    document = a_run().model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "metadata": {**document["metadata"], "namespace": "team"},
        "spec": {**document["spec"], **changes},
        "status": {},
    }


def test_a_good_one_is_read() -> None:
    assert parse_run(raw()).spec == a_run().spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"color": "red"}, "spec.color: there is no such field"),
        ({"lora": {"r": 0}}, "spec.lora.r: Input should be greater than or equal to 1"),
        (
            {"training": {"maxSteps": 1, "globalBatchSize": 7, "microBatchSize": 4}},
            "spec.training.globalBatchSize is 7",
        ),
    ],
)
def test_a_bad_one_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRunError) as raised:
        parse_run(raw(**changes))
    assert words in str(raised.value)
    assert raised.value.metadata.name == "tickets"


def test_a_status_that_cannot_be_read_is_started_anew() -> None:
    with pytest.raises(InvalidRunError) as raised:
        parse_run({**raw(), "status": {"attempt": "many"}})
    assert "status.attempt" in str(raised.value)
    assert raised.value.status.attempt == 0


def test_what_a_run_leaves_to_its_runtime_is_filled_in() -> None:
    run = parse_run({**raw(publish={}), "status": {"runtime": {"name": "h100", "spec": {"store": "s3://of/runtime"}}}})
    assert run.spec.publish.store == "s3://of/runtime"


def test_a_snapshot_that_cannot_be_read_is_named_and_kept() -> None:
    """By an operator of an older version, say. What the status knows besides must not be lost."""
    runtime = {"name": "h100", "generation": 2, "spec": {"ofALaterVersion": 1}}
    with pytest.raises(InvalidRunError) as raised:
        parse_run({**raw(), "status": {"attempt": 3, "runtime": runtime}})
    assert str(raised.value) == "status.runtime.spec.ofALaterVersion: there is no such field"
    assert raised.value.status.attempt == 3
    assert raised.value.status.to_wire()["runtime"] == runtime


def test_a_runtime_is_read_with_what_the_api_server_adds() -> None:
    metadata = {"name": "h100", "uid": "u", "generation": 4, "resourceVersion": "9"}
    runtime = parse_runtime({"metadata": metadata, "spec": {"image": "trainer:1"}, "status": {}}, raw())
    assert (runtime.metadata.name, runtime.metadata.generation, runtime.spec.image) == ("h100", 4, "trainer:1")


def test_a_runtime_that_cannot_be_read_is_named() -> None:
    with pytest.raises(
        InvalidRunError, match=r"ClusterLoRARuntime h100: spec\.limits\.maxPods: there is no such field"
    ):
        parse_runtime({"metadata": {"name": "h100"}, "spec": {"limits": {"maxPods": 1}}}, raw())
