"""Documents of other versions: what is not known is kept or left out, and what cannot be understood is an error."""

import copy
import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from lora_api import RULES, FailureClass, LoRAFineTuneStatus, Phase, RunSpec
from lora_api.adapter import VersionPointer
from lora_api.preflight import PreflightOutcome
from lora_api.reading import read, read_json

RUN: dict[str, Any] = {
    "namespace": "team",
    "name": "support",
    "uid": "u-1",
    "baseModel": {"uri": "s3://models/m"},
    "dataset": {"train": {"uri": "s3://data/t.jsonl"}},
    "training": {"maxSteps": 18},
    "publish": {"store": "s3://adapters"},
}

LEFT_OUT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing is new": ({}, set()),
    "a field at the top": ({"later": 1}, {"later"}),
    "a section": ({"later": {"a": {"b": 1}}}, {"later"}),
    "a field in a section": ({"training": {"maxSteps": 18, "later": [1]}}, {"training.later"}),
    "a field two sections down": (
        {"dataset": {"train": {"uri": "s3://data/t.jsonl", "later": None}, "too": 1}},
        {"dataset.train.later", "dataset.too"},
    ),
    "a higher version": ({"version": 99}, set()),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_fields_of_a_newer_version_are_left_out_and_named(case: str) -> None:
    change, want = LEFT_OUT[case]
    document = {**RUN, **change}
    before = copy.deepcopy(document)
    for reading in (read(RunSpec, document), read_json(RunSpec, json.dumps(document))):
        assert set(reading.left_out) == want
        assert reading.value.training == RunSpec.model_validate(RUN).training
    assert document == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"training": {"maxSteps": 18, "objective": "orpo", "later": 1}}, "training.objective"),
        ({"publish": {}, "later": 1}, "publish.store"),
    ],
)
def test_a_value_that_is_not_understood_is_an_error_and_names_only_that(change: dict[str, Any], field: str) -> None:
    for reader, document in ((read, {**RUN, **change}), (read_json, json.dumps({**RUN, **change}))):
        with pytest.raises(ValidationError) as raised:
            reader(RunSpec, document)
        assert [".".join(map(str, item["loc"])) for item in raised.value.errors()] == [field]


def test_what_is_no_json_is_an_error() -> None:
    with pytest.raises(ValidationError, match="Invalid JSON"):
        read_json(RunSpec, "{")


def test_a_word_of_a_newer_version_stays_that_word() -> None:
    for word in (FailureClass("FabricDegraded"), pickle.loads(pickle.dumps(FailureClass("FabricDegraded")))):
        assert (word, str(word), word.known) == ("FabricDegraded", "FabricDegraded", False)
        assert hash(word) == hash("FabricDegraded")
    assert FailureClass("Internal") is FailureClass.INTERNAL
    assert FailureClass.INTERNAL.known
    status = LoRAFineTuneStatus.model_validate({"phase": "Archived"})
    assert (status.phase, status.to_wire()["phase"]) == (Phase("Archived"), "Archived")
    assert list(FailureClass) == list(RULES), "it does not become one of the words that are known"


@pytest.mark.parametrize("word", ["", "a" * 65, "two words", "Ünknown", "a\nb", 7])
def test_what_is_no_word_is_an_error(word: object) -> None:
    with pytest.raises(ValidationError):
        LoRAFineTuneStatus.model_validate({"phase": word})


def test_there_is_a_rule_for_every_class_and_it_costs_nothing() -> None:
    rule = RULES[FailureClass("FabricDegraded")]
    assert (rule.failure_class, rule.charged, rule.retried, rule.exit_code) == ("FabricDegraded", False, False, None)
    assert "FabricDegraded" not in RULES, "looking it up leaves the table as it is"


def test_records_in_the_store_are_read_whatever_their_version() -> None:
    pointer = {"version": 3, "digest": "sha256:" + "a" * 64, "runUid": "u", "createdAt": "2026-11-23T18:00:00Z"}
    read_back = VersionPointer.model_validate({**pointer, "schemaVersion": 7, "later": True})
    assert (read_back.version, read_back.schema_version) == (3, 7)
    assert PreflightOutcome.model_validate({"version": 9}).run_version == 1
