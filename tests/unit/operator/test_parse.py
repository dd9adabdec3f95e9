"""A specification that cannot be read is refused with the field's path."""

from typing import Any

import pytest

from lora_operator.parse import InvalidRunError, parse_run
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
        ({"color": "red"}, "spec.color: Extra inputs are not permitted"),
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
