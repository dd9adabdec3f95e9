"""The NetworkPolicy of a run, as files: ``UPDATE_GOLDEN=1 pytest tests/unit/operator`` writes them anew."""

from typing import Any

import pytest

from lora_api import LoRAFineTune
from lora_operator.children.job import build_job, build_preflight_job
from lora_operator.children.networkpolicy import build_network_policy
from lora_operator.state.runtimes import build_snapshot
from tests.unit.operator.builders import a_run, a_runtime
from tests.unit.operator.cases import SETTINGS
from tests.unit.operator.test_children import check_golden


def taken(**runtime: Any) -> LoRAFineTune:
    """A run that took a runtime, as its status keeps it."""
    return a_run(status={"runtime": build_snapshot(a_runtime(**runtime)).to_wire()})


NARROW = [
    {"cidr": "10.1.0.0/16", "except": ["10.1.9.0/24"], "ports": [{"port": 443}, {"port": 8000, "endPort": 8010}]},
    {"cidr": "fd00:1::/32"},
    {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "mlflow"}},
        "podSelector": {"matchLabels": {"app": "mlflow"}},
        "ports": [{"port": 5000, "protocol": "TCP"}, {"port": 514, "protocol": "UDP"}],
    },
    {"podSelector": {}},
]

POLICIES = {
    "policy": a_run(),
    "policy-narrow": taken(egress=NARROW),
    "policy-closed": taken(egress=[]),
    "policy-gke": taken(egress=[], identity="gke"),
    "policy-eks": taken(identity="eksPodIdentity"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_is_as_its_file_says(name: str) -> None:
    check_golden(name, [build_network_policy(POLICIES[name])])


def test_a_runtime_that_says_nothing_of_networks_changes_nothing() -> None:
    assert build_network_policy(taken(store="s3://models")) == build_network_policy(a_run())


def test_it_selects_the_pods_of_the_run_and_of_no_other_one_of_its_name() -> None:
    run, later = a_run(), a_run(metadata={"uid": "another"})
    selected = build_network_policy(run)["spec"]["podSelector"]["matchLabels"]
    for job in (build_job(run, 1, SETTINGS), build_job(run, 2, SETTINGS), build_preflight_job(run, 1, SETTINGS)):
        assert selected.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert not selected.items() <= build_job(later, 1, SETTINGS)["spec"]["template"]["metadata"]["labels"].items()


def test_no_label_of_a_runs_own_makes_its_pods_those_of_another() -> None:
    run = a_run(podTemplate={"labels": {"lorafinetune.io/uid": "another"}})
    assert build_job(run, 1, SETTINGS)["spec"]["template"]["metadata"]["labels"]["lorafinetune.io/uid"] == "run-uid"
