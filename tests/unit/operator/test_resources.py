"""What a preflight asks for, and where it runs."""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest

from lora_api import LoRAFineTune
from lora_operator.children.job import build_preflight_job
from lora_operator.children.resources import preflight_resources
from lora_operator.lifecycle.decide import decide
from lora_operator.settings import Settings
from lora_operator.state.quantities import parse_exactly
from lora_operator.state.reports import Refusal, Reports
from lora_operator.state.runtimes import build_snapshot, fill_in
from lora_operator.status.compute import compute_status
from tests.unit.operator.builders import NOW, a_preflight, a_run, a_runtime, seen

Resources = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Case:
    want: Resources
    run: Resources = field(default_factory=dict)
    preflight: Resources | None = None


LITTLE = {"cpu": "500m", "memory": "1Gi"}
CASES = {
    "a run that says nothing": Case({"requests": {}, "limits": {}}),
    "limits are those of the run": Case(
        {"requests": LITTLE, "limits": {"cpu": "2", "memory": "64Gi"}},
        {"requests": {"cpu": "2", "memory": "64Gi"}, "limits": {"cpu": "2", "memory": "64Gi"}},
    ),
    "what the run asks for is the most that is asked for": Case(
        {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {}},
        {"requests": {"cpu": "250m", "memory": "512Mi"}},
    ),
    "and what it may take": Case(
        {"requests": {"cpu": "100m", "memory": "768Mi"}, "limits": {"cpu": "100m", "memory": "768Mi"}},
        {"limits": {"cpu": "100m", "memory": "768Mi"}},
    ),
    "one that asks for much without a limit": Case(
        {"requests": LITTLE, "limits": {}},
        {"requests": {"cpu": "32", "memory": "256Gi"}},
    ),
    "disk where the run names it": Case(
        {
            "requests": {"ephemeral-storage": "1Gi"},
            "limits": {"ephemeral-storage": "200Gi"},
        },
        {"requests": {"ephemeral-storage": "100Gi"}, "limits": {"ephemeral-storage": "200Gi"}},
    ),
    "disk that is only asked for": Case(
        {"requests": {"ephemeral-storage": "1Gi"}, "limits": {}},
        {"requests": {"ephemeral-storage": "100Gi"}},
    ),
    "devices are the gang's alone": Case(
        {"requests": {}, "limits": {}}, {"requests": {"rdma/hca": "1"}, "limits": {"rdma/hca": "1"}}
    ),
    "an administrator knows better": Case(
        {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"cpu": "8", "memory": "16Gi"}},
        {"limits": {"cpu": "1", "memory": "1Gi"}},
        {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"cpu": "8", "memory": "16Gi"}},
    ),
    "who raises a request has raised the limit": Case(
        {"requests": {"memory": "16Gi"}, "limits": {"memory": "16Gi"}},
        {"limits": {"memory": "2Gi"}},
        {"requests": {"memory": "16Gi"}},
    ),
    "and who lowers a limit the request": Case(
        {"requests": {"memory": "256Mi"}, "limits": {"memory": "256Mi"}},
        {"requests": {"memory": "64Gi"}, "limits": {"memory": "64Gi"}},
        {"limits": {"memory": "256Mi"}},
    ),
}


def taken(run: dict[str, Any], **runtime: Any) -> LoRAFineTune:
    """A run that has taken a runtime."""
    snapshot = build_snapshot(a_runtime("h100", **runtime))
    return fill_in(a_run(status={"runtime": snapshot.to_wire()}, **run))


@pytest.mark.parametrize("case", CASES)
def test_what_a_preflight_asks_for(case: str) -> None:
    row = CASES[case]
    run = {"podTemplate": {"resources": row.run}}
    runtime = {} if row.preflight is None else {"preflightResources": row.preflight}
    found = preflight_resources(taken(run, **runtime))
    assert found == row.want
    for name, asked in found["requests"].items():
        most = found["limits"].get(name, row.run.get("limits", {}).get(name))
        assert most is None or parse_exactly(asked) <= parse_exactly(most), "the API server refuses more"
    assert found == preflight_resources(a_run(**run)) or row.preflight, "without a runtime the same"


MIXED = {"requests": {"cpu": "2", "rdma/hca": "1"}, "limits": {"cpu": "4", "memory": "9Gi", "rdma/hca": "1"}}
OF_CPU = {"requests": {"cpu": "2"}, "limits": {"cpu": "4", "memory": "9Gi"}}
LEAST = 'pods "x" is forbidden: minimum cpu usage per Container is 1, but request is 500m'
RATIO = 'pods "x" is forbidden: cpu max limit to request ratio per Container is 4, but provided ratio is 8.000000'
DEFAULT = 'Pod "x" is invalid: requests: Invalid value: "500m": must be less than or equal to cpu limit of 250m'
FULL = 'pods "x" is forbidden: exceeded quota: rule, requested: limits.memory=8Gi'
REFUSALS: dict[str, tuple[str, Resources, bool]] = {
    "a least": (LEAST, MIXED, True),
    "a ratio": (RATIO, MIXED, True),
    "limits by default": (DEFAULT, MIXED, True),
    "a quota, which asks for less": (FULL, MIXED, False),
    "what the gang would be refused, too": (LEAST, {"requests": {"cpu": "100m"}}, False),
    "what has nothing to do with amounts": ('pods "x" is forbidden: violates PodSecurity', MIXED, False),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_preflight_that_asks_for_too_little_asks_for_what_the_gang_does(case: str) -> None:
    words, resources, again = REFUSALS[case]
    run = a_run(podTemplate={"resources": resources})
    reports = Reports(refusal=Refusal(words, NOW))
    plan = decide(seen(run, a_preflight(), reports=reports), NOW, Settings())
    assert (plan.failed is not None, plan.ended) == (again, False)
    if plan.failed is None:
        return
    assert not plan.failed.charged
    run = run.model_copy(update={"status": compute_status(run, plan, reports, NOW)})
    assert preflight_resources(run) == OF_CPU
    assert decide(seen(run, a_preflight(2), reports=reports), NOW, Settings()).failure is None, "once"


def test_the_first_container_of_a_preflight_asks_for_the_same() -> None:
    """It waits for the Secret; a quota looks at it, too."""
    limits = {"limits": {"cpu": "2", "memory": "8Gi"}}
    run = a_run(credentials={"secretRef": {"name": "store"}}, podTemplate={"resources": limits})
    pod = build_preflight_job(run, 1, Settings())["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["resources"] == pod["containers"][0]["resources"] == preflight_resources(run)


GPU = {"name": "H100", "memoryGiB": 80, "nodeSelector": {"gpu": "h100", "pool": "all"}}
POOL = {"nodeSelector": {"pool": "all"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}


@pytest.mark.parametrize(
    ("run", "runtime", "selector", "avoided"),
    [
        ({}, {}, {}, [("nvidia.com/gpu.present", "true")]),
        (
            {"parallelism": {"nodes": 2, "gpusPerNode": 4}},
            {"gpu": GPU, "podTemplate": POOL},
            {"pool": "all"},
            [("gpu", "h100"), ("nvidia.com/gpu.present", "true")],
        ),
        (
            {"parallelism": {"gpusPerNode": 4}, "podTemplate": {"nodeSelector": {"gpu": "l4", "disk": "ssd"}}},
            {"gpu": GPU},
            {"gpu": "l4", "disk": "ssd"},
            [("gpu", "h100"), ("nvidia.com/gpu.present", "true"), ("pool", "all")],
        ),
        (
            {"podTemplate": {"nodeSelector": {"nvidia.com/gpu.product": "L4", "disk": "ssd"}}},
            {"gpu": {"name": "L4", "memoryGiB": 24, "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"}}},
            {"disk": "ssd"},
            [
                ("nvidia.com/gpu.present", "true"),
                ("nvidia.com/gpu.product", "L4"),
                ("nvidia.com/gpu.product", "NVIDIA-L4"),
            ],
        ),
        (
            {"podTemplate": {"nodeSelector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}}},
            {},
            {},
            [("cloud.google.com/gke-accelerator", "nvidia-h100-80gb"), ("nvidia.com/gpu.present", "true")],
        ),
        (
            {"podTemplate": {"nodeSelector": {"nvidia.com/gpu.present": "true"}}},
            {"podTemplate": {"nodeSelector": {"nvidia.com/gpu.present": "true"}}},
            {"nvidia.com/gpu.present": "true"},
            [("nvidia.com/gpu.present", "true")],
        ),
    ],
    ids=[
        "no runtime",
        "the labels of the runtime's GPUs are left out",
        "the run's own labels are kept",
        "but for those that only GPUs have",
        "whoever has made the cluster",
        "what the runtime wants of all pods holds",
    ],
)
def test_a_preflight_keeps_off_gpus(
    run: dict[str, Any], runtime: dict[str, Any], selector: dict[str, str], avoided: list[tuple[str, str]]
) -> None:
    pod = build_preflight_job(taken(run, **runtime), 1, Settings())["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    found = [expression for term in terms for expression in term["preference"]["matchExpressions"]]
    assert pod["nodeSelector"] == selector
    assert [(one["key"], one["values"][0]) for one in found] == avoided
    assert {one["operator"] for one in found} == {"NotIn"}, "which a node without the label fulfils"
    assert list(pod["affinity"]["nodeAffinity"]) == ["preferredDuringSchedulingIgnoredDuringExecution"]


@pytest.mark.parametrize(
    ("quantity", "want"),
    [("500m", "0.5"), ("1.5Gi", "1610612736"), ("2k", "2000"), ("4", "4"), ("1Ei", "1152921504606846976")],
)
def test_quantities_are_read_exactly(quantity: str, want: str) -> None:
    assert parse_exactly(quantity) == Decimal(want)
