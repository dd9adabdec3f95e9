"""Requests and limits that do not go together: one row for each rule."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from lora_api import FailureClass
from lora_operator.lifecycle.runtime import decide_runtime, find_refusal
from lora_operator.policies.amounts import check_amounts
from lora_operator.settings import Settings
from lora_operator.state.observed import Observed
from tests.unit.operator.builders import a_run, a_runtime

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TOO_MUCH = {"requests": {"cpu": 2.5}, "limits": {"cpu": "2"}}


@pytest.mark.parametrize(
    ("resources", "wrong"),
    [
        ({}, []),
        ({"requests": {"cpu": 0.5}, "limits": {"cpu": 1.5}}, []),
        ({"requests": {"cpu": 0.5}, "limits": {"cpu": "500m"}}, []),
        ({"requests": {"memory": "1000M"}, "limits": {"memory": "1G"}}, []),
        ({"requests": {"rdma/hca": 1}, "limits": {"rdma/hca": 1.0}}, []),
        ({"requests": {"cpu": 8}, "limits": {"memory": "1Gi"}}, []),
        (TOO_MUCH, ["at.requests.cpu is 2.5: requests may not be larger than limits (2)"]),
        (
            {"requests": {"rdma/hca": 1}, "limits": {"rdma/hca": 2}},
            ["at.requests.rdma/hca is 1: it cannot be shared, so it needs the same value in limits (2)"],
        ),
    ],
)
def test_check_amounts(resources: dict[str, Any], wrong: list[str]) -> None:
    run = a_run(podTemplate={"resources": resources})
    assert check_amounts(run.spec.pod_template.resources, "at") == wrong


def test_a_run_is_told_what_to_correct() -> None:
    refusal = find_refusal(a_run(podTemplate={"resources": TOO_MUCH}), None)
    assert refusal is not None
    assert refusal[0] is FailureClass.BAD_SPEC
    assert refusal[1].startswith("spec.podTemplate.resources.requests.cpu is 2.5")


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"preflightResources": TOO_MUCH}, "spec.preflightResources.requests.cpu"),
        ({"podTemplate": {"resources": TOO_MUCH}}, "spec.podTemplate.resources.requests.cpu"),
    ],
)
def test_a_run_waits_for_its_runtime_to_be_corrected(spec: dict[str, Any], field: str) -> None:
    runtime = a_runtime(**spec)
    observed = replace(Observed(run=a_run()), runtime=runtime)
    plan = decide_runtime(observed, NOW, Settings().for_runs())
    assert plan is not None
    assert (plan.reason, plan.phase) == ("InvalidSpec", "Pending")
    assert plan.message.startswith(f"ClusterLoRARuntime {runtime.metadata.name}: {field} is 2.5: requests may not be")
