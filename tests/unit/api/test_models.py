"""Habits of every model: strict where a user writes, forgiving where our own programs do."""

from typing import Any

import pytest
from pydantic import ValidationError

from lora_api import Condition, Failure, LoRAFineTune, LoRAFineTuneSpec, LoRAFineTuneStatus
from lora_api._base import cut_middle

SPEC: dict[str, Any] = {
    "baseModel": {"uri": "hf://o/m"},
    "dataset": {"train": {"uri": "hf://o/d"}},
    "training": {"maxSteps": 1},
    "publish": {"store": "s3://b/p"},
}
AT = "2026-11-23T18:00:00Z"

REFUSED = {
    "an unknown field": ("lora", {"rank": 8}, "lora.rank"),
    "a number in quotes": ("lora", {"r": "8"}, "lora.r"),
    "a truth for a number": ("lora", {"r": True}, "lora.r"),
    "a number for a truth": ("quantization", {"doubleQuant": 1}, "quantization.doubleQuant"),
    "a list for text": ("publish", {"store": ["s3://b"]}, "publish.store"),
    "not a number": ("training", {"epochs": float("nan")}, "training.epochs"),
    "an endless number": ("training", {"epochs": float("inf")}, "training.epochs"),
    "text that ends in a line break": ("baseModel", {"uri": "hf://o/m\n"}, "baseModel.uri"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_spec_is_read_strictly(case: str) -> None:
    section, value, field = REFUSED[case]
    with pytest.raises(ValidationError) as error:
        LoRAFineTuneSpec.model_validate(SPEC | {section: value})
    assert ".".join(map(str, error.value.errors()[0]["loc"])) == field


def test_a_whole_number_is_a_number() -> None:
    assert LoRAFineTuneSpec.model_validate(SPEC | {"training": {"epochs": 2}}).training.epochs == 2.0


def test_wire_and_python_names_are_both_taken() -> None:
    assert LoRAFineTuneSpec.model_validate(SPEC).base_model.uri == "hf://o/m"
    wire = LoRAFineTuneSpec.model_validate(SPEC).to_wire()
    assert LoRAFineTuneSpec.model_validate(wire).to_wire() == wire


def test_an_object_of_the_api_server_is_read_with_all_its_metadata() -> None:
    run = LoRAFineTune.model_validate(
        {
            "apiVersion": "lorafinetune.io/v1alpha1",
            "kind": "LoRAFineTune",
            "metadata": {
                "name": "n",
                "namespace": "ns",
                "uid": "u",
                "generation": 2,
                "resourceVersion": "7",
                "creationTimestamp": AT,
                "managedFields": [{"manager": "kubectl"}],
                "finalizers": ["x"],
            },
            "spec": SPEC,
        }
    )
    assert run.metadata.generation == 2
    assert run.status == LoRAFineTuneStatus()


def test_what_another_version_wrote_into_a_status_is_there_when_it_is_written_back() -> None:
    foreign = {"phase": "Running", "weather": "fine", "progress": {"step": 1, "x": {"y": [2]}}}
    status = LoRAFineTuneStatus.model_validate(foreign)
    assert status.progress is not None
    assert status.progress.step == 1
    written = status.model_copy(update={"attempt": 2}).to_wire()
    assert (written["weather"], written["progress"]["x"], written["attempt"]) == ("fine", {"y": [2]}, 2)


def test_an_unset_field_is_not_written() -> None:
    assert LoRAFineTuneStatus().to_wire() == {
        "version": 1,
        "observedGeneration": 0,
        "attempt": 0,
        "conditions": [],
        "failures": [],
        "failedPreflights": 0,
        "chargedRestarts": 0,
        "preemptions": 0,
        "suspendedAttempt": 0,
        "activeSeconds": 0,
        "gpuSeconds": 0,
    }


def test_a_status_never_fails_for_being_too_wordy() -> None:
    condition = Condition.model_validate(
        {"type": "Ready", "status": "False", "reason": "Failed", "message": "m" * 9000, "lastTransitionTime": AT}
    )
    failure = Failure.model_validate(
        {
            "attempt": 1,
            "class": "Internal",
            "message": "m" * 9000,
            "remedy": "r" * 9000,
            "logTail": "l" * 9000,
            "at": AT,
        }
    )
    assert len(condition.message) == len(failure.message) == len(failure.log_tail or "") == 4096
    assert len(failure.remedy) == 1024


CUTS = {
    "it fits": ("abcdef", 6, "abcdef"),
    "the middle goes": ("abcdefghijkl", 9, "ab ... kl"),
    "too short for a mark": ("abcdefghijkl", 6, "abcdef"),
    "nothing is left": ("abc", 0, ""),
    "less than nothing": ("abc", -4, ""),
}


@pytest.mark.parametrize("case", CUTS)
def test_text_is_cut_in_its_middle(case: str) -> None:
    text, length, want = CUTS[case]
    assert cut_middle(text, length) == want
