"""The pure parts of the comparison with peers."""

import base64
import json
from typing import Any

import pytest

from bench.peers.contenders import CONTENDERS
from bench.peers.manifests import build_config, build_rights, build_webhooks, read_selectors
from bench.peers.measure import burst_seconds, latencies, per_run
from bench.peers.report import ratios, to_markdown
from bench.scale.audit import Call, parse_call

OURS, THEIRS = CONTENDERS


def call(verb: str, resource: str, name: str, at: float, *, code: int = 201, user: str = "jobset") -> Call:
    return Call(at, at + 0.5, user, "agent", verb, resource, "team", name, code)


@pytest.mark.parametrize(
    ("contender", "job", "run"), [(OURS, "run-0-7-1", "run-0-7"), (THEIRS, "run-0-7-node-0", "run-0-7")]
)
def test_a_job_is_that_of_its_run(contender: Any, job: str, run: str) -> None:
    assert contender.run_of(job) == run


CALLS = (
    call("create", "trainjobs", "run-0-0", 10.0, user="bench"),
    call("create", "trainjobs", "run-0-1", 11.0, user="bench"),
    call("create", "jobs", "run-0-0-node-0", 12.0, code=409),
    call("create", "jobs", "run-0-0-node-0", 13.0),
    call("create", "jobs", "run-0-0-launcher-0", 14.0),
    call("create", "jobs", "run-0-1-node-0", 15.5),
)


def test_a_run_is_launched_when_the_last_of_its_jobs_is_stored() -> None:
    names = ["run-0-0", "run-0-1"]
    assert latencies(CALLS, names, "trainjobs", THEIRS.run_of) == [4500.0, 5000.0]
    assert burst_seconds(CALLS, names, "trainjobs", THEIRS.run_of) == 6.0


def test_watches_and_elections_are_no_calls_of_a_run() -> None:
    others = (call("watch", "jobs", "", 1.0), call("update", "leases", "lock", 1.0))
    assert per_run((*CALLS, *others), 2) == {"create jobs": 2.0, "create trainjobs": 1.0}


def test_calls_of_several_users_and_creations_of_another_kind_are_read() -> None:
    def line(user: str, verb: str, resource: str) -> str:
        entry = {
            "user": {"username": user}, "verb": verb, "objectRef": {"resource": resource, "name": "x"},
            "requestReceivedTimestamp": "2026-11-25T04:00:00Z", "stageTimestamp": "2026-11-25T04:00:01Z",
        }  # fmt: skip
        return json.dumps(entry, separators=(",", ":"))

    read = [
        parse_call(line(*what), ("jobset", "kubeflow-trainer"), "trainjobs") is not None
        for what in (
            ("jobset", "create", "jobs"),
            ("kubeflow-trainer", "patch", "jobsets"),
            ("bench", "create", "trainjobs"),
            ("bench", "create", "lorafinetunes"),
            ("lora-operator", "create", "jobs"),
        )
    ]
    assert read == [True, True, True, False, False]


def test_a_peer_keeps_its_configuration_but_for_where_it_listens() -> None:
    shipped = {"clientConnection": {"qps": 50, "burst": 100}, "leaderElection": {"leaderElect": True}}
    ports = {"health": 1, "metrics": 2, "webhook": 3}
    config = build_config(shipped, ports, "peer-system", "certManagement")
    assert config["clientConnection"] == shipped["clientConnection"]
    assert config["leaderElection"] == {"leaderElect": True, "resourceNamespace": "peer-system"}
    assert config["webhook"] == {"host": "127.0.0.1", "port": 3}
    assert config["certManagement"] == {"enable": False}
    assert shipped["leaderElection"] == {"leaderElect": True}, "what was read stays as it is"


def test_a_webhook_is_called_at_an_address_with_the_selector_of_its_patch() -> None:
    hook = {"name": "mpod.kb.io", "clientConfig": {"service": {"path": "/mutate--v1-pod"}}, "failurePolicy": "Fail"}
    selector = {"matchExpressions": [{"key": "jobset", "operator": "Exists"}]}
    patches = [[{"op": "replace", "path": "/webhooks/1", "value": {**hook, "objectSelector": selector}}]]
    shipped = [{"metadata": {"name": "shipped"}, "webhooks": [hook, {**hook, "name": "mjobset.kb.io"}]}]
    (made,) = build_webhooks("jobset", shipped, 9443, b"authority", read_selectors(patches))
    assert made["metadata"]["name"] == "jobset"
    pods, jobsets = made["webhooks"]
    assert pods["clientConfig"]["url"] == "https://127.0.0.1:9443/mutate--v1-pod"
    assert base64.b64decode(pods["clientConfig"]["caBundle"]) == b"authority"
    assert pods["objectSelector"] == selector
    assert "objectSelector" not in jobsets
    assert pods["failurePolicy"] == "Fail"


def test_a_user_gets_the_rules_of_all_roles() -> None:
    role, binding = build_rights("jobset", [{"rules": [1]}, {"rules": [2, 3]}])
    assert role["rules"] == [1, 2, 3]
    assert binding["subjects"][0]["name"] == "jobset"


def numbers(rate: float, p50: float) -> dict[str, Any]:
    cpu = {"ownCpuMsPerRun": 1.0, "apiServerCpuMsPerRun": 2.0, "etcdCpuMsPerRun": 3.0, "rssMiB": 80.0}
    return {
        "launches": {"runs": 300, "perSecond": 10.0, "load": 1.0, "p50Ms": p50, "p99Ms": 2 * p50, "maxMs": 3 * p50},
        "burst": {"runs": 1000, "seconds": 20.0, "perSecond": rate, "callsPerRun": {"create jobs": 1.0}, **cpu},
    }


@pytest.mark.parametrize(
    ("rates", "told"), [([60.0, 70.0], "**2.17**, the median of 2 rounds (aim: 2.0, reached)"), ([30.0, 40.0], "NOT")]
)
def test_the_ratio_is_that_of_each_round(rates: list[float], told: str) -> None:
    result = {
        "machine": {"cores": 2, "processor": "x86_64"}, "contenders": ["ours", "theirs"], "first": 20,
        "clients": {"ours": "500 and 1000"},
        "rounds": {"ours": [numbers(rate, 20.0) for rate in rates], "theirs": [numbers(30.0, 40.0)] * 2},
    }  # fmt: skip
    assert ratios(result, "launches", "p50Ms") == [0.5, 0.5]
    text = to_markdown(result)
    assert told in text
    assert "| one by one: p50, ms | 20 | 40 | 0.50 |" in text
