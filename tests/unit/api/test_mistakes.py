"""A field that does not exist is told with the one that was probably meant."""

from typing import Any

import pytest
from pydantic import ValidationError

from lora_api import LoRAFineTune
from lora_api.mistakes import describe_mistakes, field_paths, suggest_field
from lora_api.pods import ResourceRequirements
from tests.unit.operator.builders import a_run


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("spec.training.maxSeqLength", "spec.dataset.maxSeqLength"),
        ("spec.training.learning_rate", "spec.training.learningRate"),
        ("spec.training.batchSize", "spec.training.microBatchSize"),
        ("spec.parallelism.gpusPerNodes", "spec.parallelism.gpusPerNode"),
        ("spec.lora.R", "spec.lora.r"),
        ("spec.runPolicy.publish.store", "spec.publish.store"),
        ("spec.queueName", "spec.runPolicy.queueName"),
        ("spec.podTemplate.tolerations.0.keys", "spec.podTemplate.tolerations.key"),
        ("spec.color", ""),
    ],
)
def test_suggest_field(path: str, meant: str) -> None:
    assert suggest_field(path, LoRAFineTune) == meant


def test_fields_of_nested_models_are_known() -> None:
    assert {"spec", "spec.training.dpo.beta", "spec.podTemplate.resources.limits"} <= set(field_paths(LoRAFineTune))


def test_describe_mistakes() -> None:
    document: dict[str, Any] = a_run().to_wire()
    document["spec"]["training"] |= {"maxSeqLength": 4096, "learningRate": "fast"}
    document["spec"]["color"] = "red"
    with pytest.raises(ValidationError) as raised:
        LoRAFineTune.model_validate(document)
    text = describe_mistakes(raised.value, LoRAFineTune, "tickets: ", most=2)
    assert (
        "tickets: spec.training.maxSeqLength: there is no such field; did you mean spec.dataset.maxSeqLength?" in text
    )
    assert "spec.training.learningRate: Input should be a valid number" in text
    assert text.endswith(" (and 1 more)")


@pytest.mark.parametrize("value", [True, -1, -0.5, float("inf"), float("nan"), [4], {}, "8 GB"])
def test_what_is_no_quantity(value: Any) -> None:
    with pytest.raises(ValidationError):
        ResourceRequirements.model_validate({"limits": {"cpu": value}})
