"""Numbers and quantities as people and their clients write them."""

import functools
from typing import Any

import pytest

from lora_api import LoRAFineTuneSpec
from tests.support.crd import (
    MAXIMAL,
    MINIMAL,
    PATHS,
    DryRun,
    has,
    place,
)

pytestmark = pytest.mark.controlplane


WHOLE = [path for path, node in PATHS.items() if node.get("type") == "integer" and "[" not in path and ":" not in path]


def test_a_whole_number_with_a_point_is_taken_or_its_field_is_named(dry: DryRun) -> None:
    """Of clients that write 2.0 where kubectl writes 2. CEL can read neither such a field nor what is beside it."""
    refused = set()
    for path in (*(path for path in WHOLE if has(MAXIMAL, path)), "training.microBatchSize"):
        value = functools.reduce(lambda node, part: node[part], path.split("."), MAXIMAL)
        code, answer = dry.create_run(place(MAXIMAL, path, float(value)))
        if code == 201:
            assert functools.reduce(lambda node, part: node[part], path.split("."), answer["spec"]) == value
            continue
        refused.add(path)
        said = {cause["field"]: cause["message"] for cause in answer["details"]["causes"]}
        words = said.get(f"spec.{path}", "")
        assert words.endswith(("evaluating rule: write it without point or exponent", "a whole number from 1 to 1024"))
    assert len(refused) == 8


RESOURCES: dict[str, dict[str, Any]] = {
    "numbers, as in any pod": {"requests": {"cpu": 4, "memory": "8Gi"}},
    "numbers of whole devices": {"requests": {"rdma/hca": 1}, "limits": {"rdma/hca": 1}},
    "a number and the same in quotes": {"requests": {"rdma/hca": 1}, "limits": {"rdma/hca": "1"}},
    "bytes": {"limits": {"memory": 68719476736}},
    "an exponent": {"limits": {"memory": "64e9"}},
    "parts": {"requests": {"cpu": 0.5, "memory": 1.5}, "limits": {"cpu": 1.5, "memory": 1e30}},
    "whole numbers with a point": {"limits": {"cpu": 4.0}},
}


@pytest.mark.parametrize("case", RESOURCES)
def test_a_quantity_needs_no_quotes(dry: DryRun, case: str) -> None:
    spec = place(MINIMAL, "podTemplate.resources", RESOURCES[case])
    code, answer = dry.create_run(spec)
    assert code == 201, answer["message"]
    assert dry.create_runtime({"podTemplate": {"resources": RESOURCES[case]}})[0] == 201
    own = {"preflightResources": {"requests": {"cpu": 0.5}, "limits": {"cpu": 1}}}
    assert dry.create_runtime(own)[0] == 201
    taken = LoRAFineTuneSpec.model_validate(answer["spec"]).pod_template.resources.to_wire()
    pod = {"containers": [{"name": "c", "image": "i", "resources": taken}]}
    pods = "/api/v1/namespaces/default/pods"
    created, of_text = dry.create(pods, {"metadata": {"name": "p"}, "spec": pod})
    assert created == 201, of_text
    pod["containers"][0]["resources"] = RESOURCES[case]
    of_numbers = dry.create(pods, {"metadata": {"name": "p"}, "spec": pod})[1]
    assert of_text["spec"]["containers"] == of_numbers["spec"]["containers"], "a pod takes the same numbers so"
