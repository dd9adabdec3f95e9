"""The NetworkPolicy of a run on a real API server: before the first pod, between attempts, and until the last one.

What it keeps from whom is in tests/security/cluster.
"""

from collections.abc import Callable
from typing import Any

import pytest

from lora_operator.settings import Settings
from tests.support.api import Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, running, settled
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane


def path(run: Run) -> str:
    return f"/apis/networking.k8s.io/v1/namespaces/{run.namespace}/networkpolicies"


def calls_about(operator: OperatorThread, *kinds: str) -> list[str]:
    """Method and kind of each call about ``kinds``, in order."""
    found = []
    for call in operator.calls:
        method, _, where = call.partition(" ")
        found += [f"{method} {kind}" for kind in kinds if f"/{kind}" in where and "?" not in where]
    return found


def test_one_policy_for_the_run_is_there_before_its_first_pod_and_stays(
    run: Run, fast_settings: Callable[..., Settings]
) -> None:
    with OperatorThread(fast_settings(run.namespace, preflight="on")) as operator:
        run.create()
        run.set_preflight(1, running())
        [policy] = run.policies()
        uid = run.raw["metadata"]["uid"]
        assert (policy["metadata"]["name"], policy["metadata"]["ownerReferences"][0]["uid"]) == ("run", uid)
        assert policy["spec"]["podSelector"] == {"matchLabels": {"lorafinetune.io/uid": uid}}
        [checking] = run.preflight_pods(1)
        run.set_preflight(1, ended(0, settled(), "Completed"))
        run.set_running(1)
        run.set_failed(1, "StoreUnavailable", 74)
        run.set_running(2)
        for pod in (checking, *run.gang(2)):
            assert pod["metadata"]["labels"]["lorafinetune.io/uid"] == uid
        assert [item["metadata"]["uid"] for item in run.policies()] == [policy["metadata"]["uid"]]
    launches = [call for call in calls_about(operator, "networkpolicies", "jobs") if call[:3] != "DEL"]
    about = [call for call in launches if call != "GET jobs"]
    assert about == [
        *("POST networkpolicies", "POST jobs"),
        *("GET networkpolicies", "POST jobs"),
        *("GET networkpolicies", "POST jobs"),
    ], "one call a launch"


def test_one_that_somebody_deleted_is_back_before_the_next_pods(run: Run, operator: OperatorThread) -> None:
    """Attack: whoever may delete NetworkPolicies by mistake or habit opens a gang for good."""
    run.create()
    run.set_running(1)
    run.wait_phase("Running")
    run.api.delete(f"{path(run)}/run")
    assert run.policies() == []
    run.set_failed(1, "StoreUnavailable", 74)
    run.gang(2)
    [policy] = run.policies()
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    kinds = [call.split("/")[-1] for call in operator.calls if call.startswith("POST") and "/events" not in call]
    assert kinds == ["networkpolicies", "services", "jobs", "networkpolicies", "jobs"]


@pytest.mark.parametrize("preflight", ["on", "off"])
def test_a_policy_of_somebody_else_with_the_runs_name_ends_the_run(
    run: Run, fast_settings: Callable[..., Settings], preflight: str
) -> None:
    """Attack: a policy that lets everybody in is there first, with the name that the run's will have."""
    foreign: Raw = {"metadata": {"name": "run"}, "spec": {"podSelector": {}, "ingress": [{}]}}
    before = run.api.create(path(run), foreign)
    with OperatorThread(fast_settings(run.namespace, preflight=preflight)):
        run.create()
        status = run.wait_phase("Failed")
    assert status["failures"][0]["class"] == "NameConflict"
    assert "NetworkPolicy run exists already and belongs to no LoRAFineTune" in run.condition("Stalled")["message"]
    assert run.jobs() == []
    after = run.api.get(f"{path(run)}/run")
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])


def test_what_the_runtime_says_when_the_run_takes_it_is_in_the_policy(run: Run, operator: OperatorThread) -> None:
    runtimes = "/apis/lorafinetune.io/v1alpha1/clusterloraruntimes"
    head = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "ClusterLoRARuntime"}
    name = f"narrow-{run.namespace}"
    egress: list[dict[str, Any]] = [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"], "ports": [{"port": 443}]}]
    spec = {"egress": egress, "identity": "gke"}
    run.api.create(runtimes, {**head, "metadata": {"name": name}, "spec": spec})
    run.create(lambda made: made.update(runtimeRef={"name": name}))
    run.gang(1)
    [policy] = run.policies()
    blocks = [peer["ipBlock"] for rule in policy["spec"]["egress"] for peer in rule.get("to", ()) if "ipBlock" in peer]
    assert blocks == [
        {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]},
        {"cidr": "169.254.169.252/32"},
        {"cidr": "169.254.169.254/32"},
    ]


def test_a_runtime_with_a_rule_that_cannot_be_waits_for_its_administrator(run: Run, operator: OperatorThread) -> None:
    runtimes = "/apis/lorafinetune.io/v1alpha1/clusterloraruntimes"
    head = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "ClusterLoRARuntime"}
    name = f"wrong-{run.namespace}"
    wrong = {"egress": [{"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]}]}
    run.api.create(runtimes, {**head, "metadata": {"name": name}, "spec": wrong})
    run.create(lambda made: made.update(runtimeRef={"name": name}))
    words = "192.168.0.0/16 is no part of 10.0.0.0/8"
    run.wait("it says why", lambda status: words in run.condition("Ready").get("message", ""))
    assert f"ClusterLoRARuntime {name}: spec.egress.0" in run.condition("Ready")["message"]
    assert (run.jobs(), run.policies()) == ([], [])
    run.api.patch(f"{runtimes}/{name}", {"spec": {"egress": []}})
    run.gang(1)


def test_without_policies_none_is_made_and_one_from_before_goes_at_the_end(
    run: Run, fast_settings: Callable[..., Settings]
) -> None:
    with OperatorThread(fast_settings(run.namespace)):
        run.create(lambda spec: spec.update(runPolicy={"ttlSecondsAfterFinished": 0}))
        run.set_running(1)
        run.wait_phase("Running")
    with OperatorThread(fast_settings(run.namespace, network_policy="off")):
        other = Run(run.api, run.namespace, "other").create()
        other.gang(1)
        assert other.policies() == []
        run.set_succeeded(1)
        eventually("nothing left", lambda: (run.jobs(), run.policies()) == ([], []))


def test_it_goes_after_the_pods(run: Run, operator: OperatorThread) -> None:
    """Attack: a pod that does not end at once is left alone by its policy, and asks the cloud for the node's keys."""
    run.create(lambda spec: spec.update(runPolicy={"ttlSecondsAfterFinished": 0}))
    run.set_running(1)
    run.wait_phase("Running")
    late = run.gang(1)[1]["metadata"]["name"]
    pods = f"/api/v1/namespaces/{run.namespace}/pods"
    run.api.patch(f"{pods}/{late}", {"metadata": {"finalizers": ["example.org/late"]}})
    run.set_ended(1, 0, 65, '{"version": 1, "outcome": "failed", "class": "BadData", "message": "record 7"}')
    run.wait_phase("Failed")
    eventually("the pod is to end", lambda: "deletionTimestamp" in run.api.get(f"{pods}/{late}")["metadata"])
    assert len(run.policies()) == 1
    assert len(run.services()) == 1
    run.api.patch(f"{pods}/{late}", {"metadata": {"finalizers": None}})
    eventually("nothing left", lambda: (run.jobs(), run.services(), run.policies()) == ([], [], []))
