"""Pods keep away from the nodes that failed their run, and stay where they were asked to be."""

from typing import Any

import pytest

from lora_operator.children.affinity import keep_away, lean_away
from lora_operator.children.job import build_job, build_preflight_job
from lora_operator.settings import Settings
from tests.unit.operator.builders import NOW, a_run, stamp

AWAY = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in ("n1", "n2")]
H100 = {"key": "gpu", "operator": "In", "values": ["h100"]}
ZONE = {"key": "zone", "operator": "In", "values": ["a"]}
FIELD = {"key": "metadata.name", "operator": "In", "values": ["n5"]}
RUN = a_run(status={"avoidedNodes": [{"name": name, "since": stamp(NOW)} for name in ("n2", "n1")]})
TERMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "no affinity": ({}, [{"matchFields": AWAY}]),
    "one that asks for nothing": ({"nodeAffinity": {}}, [{"matchFields": AWAY}]),
    "each alternative keeps away": (
        {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [H100]}, {"matchExpressions": [ZONE], "matchFields": [FIELD]}]
        }}},
        [
            {"matchExpressions": [H100], "matchFields": AWAY},
            {"matchExpressions": [ZONE], "matchFields": [FIELD, *AWAY]},
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_what_is_asked_of_nodes_still_holds(name: str) -> None:
    affinity, want = TERMS[name]
    template = {"spec": {"affinity": affinity, "nodeSelector": {"a": "b"}}}
    found = keep_away(template, (RUN.status.avoided_nodes or []))
    required = found["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"] == want
    assert found["spec"]["nodeSelector"] == {"a": "b"}
    assert template["spec"]["affinity"] == affinity, "what was given is not changed"


def test_what_is_preferred_and_what_is_said_of_pods_stays() -> None:
    affinity = {
        "podAntiAffinity": {"x": 1},
        "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]},
    }
    found = keep_away({"spec": {"affinity": affinity}}, (RUN.status.avoided_nodes or []))["spec"]["affinity"]
    assert found["podAntiAffinity"] == {"x": 1}
    assert found["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] == [{"weight": 1}]


REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def test_gangs_keep_away_and_others_are_as_they_were() -> None:
    assert REQUIRED in build_job(RUN, 2, Settings())["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    assert "affinity" not in build_job(a_run(), 2, Settings())["spec"]["template"]["spec"]


def test_a_preflight_takes_an_avoided_node_where_there_is_no_other() -> None:
    """It gives nothing back and forgets no node, so that it would wait for ever."""
    plain, found = (
        build_preflight_job(run, 1, Settings())["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
        for run in (a_run(), RUN)
    )
    assert list(found) == [PREFERRED]
    others, away = found[PREFERRED][:-1], found[PREFERRED][-1]
    assert away == {"weight": 100, "preference": {"matchFields": AWAY}}
    assert [one["preference"] for one in others] == [one["preference"] for one in plain[PREFERRED]]


@pytest.mark.parametrize("many", [1, 2, 9])
def test_a_node_that_failed_a_preflight_counts_for_more_than_all_else_it_prefers(many: int) -> None:
    affinity = {"nodeAffinity": {PREFERRED: [{"weight": 100, "preference": {"x": one}} for one in range(many)]}}
    found = lean_away({"spec": {"affinity": affinity}}, RUN.status.avoided_nodes or [])
    weights = [one["weight"] for one in found["spec"]["affinity"]["nodeAffinity"][PREFERRED]]
    assert weights[-1] == 100
    assert 0 < sum(weights[:-1]) <= 20
    assert affinity["nodeAffinity"][PREFERRED][0]["weight"] == 100, "what was given is not changed"
