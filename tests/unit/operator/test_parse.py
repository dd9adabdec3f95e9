"""What is not known is left out with its path; a value that is not understood is an error with its path."""

from typing import Any

import pytest

from lora_operator.state.reading import InvalidRunError, check_taken_rules, parse_run, parse_runtime
from tests.unit.operator.builders import a_run


def raw(**changes: Any) -> dict[str, Any]:
    document = a_run().model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "metadata": {**document["metadata"], "namespace": "team"},
        "spec": {**document["spec"], **changes},
        "status": {},
    }


def test_a_good_one_is_read() -> None:
    reading = parse_run(raw())
    assert (reading.value.spec, reading.left_out) == (a_run().spec, ())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
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


def test_what_a_newer_crd_fills_in_is_left_out() -> None:
    document = raw(color="red", training={"maxSteps": 18, "globalBatchSize": 8, "microBatchSize": 4, "fabric": "ib"})
    reading = parse_run(document)
    assert reading.value.spec == a_run().spec
    assert sorted(reading.left_out) == ["spec.color", "spec.training.fabric"]
    assert document["spec"]["training"]["fabric"] == "ib", "what is in the cache is nobody's to change"


def test_a_status_that_cannot_be_read_is_not_taken_for_an_empty_one() -> None:
    with pytest.raises(InvalidRunError) as raised:
        parse_run({**raw(), "status": {"attempt": "many"}})
    assert "status.attempt" in str(raised.value)
    assert raised.value.status is None


def test_what_a_run_leaves_to_its_runtime_is_filled_in() -> None:
    run = parse_run({**raw(publish={}), "status": {"runtime": {"name": "h100", "spec": {"store": "s3://of/runtime"}}}})
    assert run.value.spec.publish.store == "s3://of/runtime"


def test_a_snapshot_of_a_newer_operator_is_read_and_kept_as_it_is() -> None:
    runtime = {"name": "h100", "generation": 2, "spec": {"ofALaterVersion": 1, "store": "s3://of/runtime"}}
    reading = parse_run({**raw(publish={}), "status": {"attempt": 3, "runtime": runtime}})
    assert reading.left_out == ("status.runtime.spec.ofALaterVersion",)
    assert reading.value.spec.publish.store == "s3://of/runtime"
    assert reading.value.status.to_wire()["runtime"] == runtime


def test_a_snapshot_with_a_value_that_is_not_understood_is_named_and_kept() -> None:
    runtime = {"name": "h100", "generation": 2, "spec": {"imagePullPolicy": "Sometimes"}}
    with pytest.raises(InvalidRunError, match=r"status\.runtime\.spec\.imagePullPolicy") as raised:
        parse_run({**raw(), "status": {"attempt": 3, "runtime": runtime}})
    assert raised.value.status is not None
    assert raised.value.status.attempt == 3
    assert raised.value.status.to_wire()["runtime"] == runtime


def test_a_runtime_is_read_with_what_the_api_server_adds() -> None:
    metadata = {"name": "h100", "uid": "u", "generation": 4, "resourceVersion": "9"}
    runtime = parse_runtime({"metadata": metadata, "spec": {"image": "trainer:1"}, "status": {}}, raw()).value
    assert (runtime.metadata.name, runtime.metadata.generation, runtime.spec.image) == ("h100", 4, "trainer:1")


def test_a_runtime_is_read_without_what_a_newer_crd_fills_in() -> None:
    reading = parse_runtime({"metadata": {"name": "h100"}, "spec": {"rack": "a", "limits": {"maxNodes": 2}}}, raw())
    assert reading.value.spec.limits.max_nodes == 2
    assert reading.left_out == ("ClusterLoRARuntime h100: spec.rack",)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"limits": {"maxPods": 1}}, "limits.maxPods"),
        ({"allowedNamespaces": {"matchFields": []}}, "allowedNamespaces.matchFields"),
        ({"egress": [{"cidr": "10.0.0.0/8", "hosts": ["a"]}]}, "egress.0.hosts"),
    ],
)
def test_no_run_begins_beside_a_rule_of_a_newer_version(spec: dict[str, object], path: str) -> None:
    with pytest.raises(InvalidRunError, match=f"ClusterLoRARuntime h100: spec.{path}: .* does not know that rule"):
        parse_runtime({"metadata": {"name": "h100"}, "spec": spec}, raw())


def test_no_run_goes_on_from_a_snapshot_with_a_rule_of_a_newer_version() -> None:
    taken = {"name": "h100", "spec": {"rack": "a", "egress": [{"namespaceSelector": {"matchExpressions": []}}]}}
    document = {**raw(), "status": {"runtime": taken}}
    with pytest.raises(InvalidRunError, match=r"status\.runtime\.spec\.egress\.0\..*matchExpressions: .* Remedy: "):
        check_taken_rules(parse_run(document).left_out, document)
    taken["spec"].pop("egress")
    check_taken_rules(parse_run(document).left_out, document)


def test_a_runtime_that_is_not_understood_is_named() -> None:
    with pytest.raises(InvalidRunError, match=r"ClusterLoRARuntime h100: spec\.imagePullPolicy"):
        parse_runtime({"metadata": {"name": "h100"}, "spec": {"imagePullPolicy": "Sometimes"}}, raw())
