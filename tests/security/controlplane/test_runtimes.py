"""What a run tries to get that its runtime, or no runtime, does not let it have."""

from collections.abc import Callable
from typing import Any

import pytest

from lora_operator.settings import Settings
from tests.security.controlplane.conftest import PutRuntime
from tests.support.api import Api, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, settled
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane


def refusal(run: Run) -> str:
    """What a run says that was refused before anything was made for it."""
    assert run.wait_phase("Failed")["reason"] == "RuntimeRefused"
    assert (run.jobs(), run.services()) == ([], [])
    return str(run.condition("Stalled")["message"])


def changed(name: Callable[[Raw], None], **more: Any) -> Callable[[Raw], None]:
    """A change of a run's spec: its runtime by ``name``, and more fields."""

    def change(spec: Raw) -> None:
        name(spec)
        spec.update(more)

    return change


WANDB = {"wandb": {"project": "p", "baseUrl": "https://attacker.test"}}
MLFLOW = {"mlflow": {"experiment": "x", "trackingUri": "https://mlflow.example.org.attacker.test"}}


@pytest.mark.parametrize(
    ("tracking", "field"), [(WANDB, "tracking.wandb.baseUrl"), (MLFLOW, "tracking.mlflow.trackingUri")]
)
@pytest.mark.parametrize("listed", [False, True])
def test_the_keys_are_sent_to_a_tracker_of_the_attackers(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime, tracking: Raw, field: str, listed: bool
) -> None:
    """Attack: a user who may not read the Secret names a tracker of their own, to which its keys are sent."""
    name = put_runtime(endpoints={"tracking": ["https://mlflow.example.org"]}) if listed else (lambda spec: None)
    run.create(changed(name, tracking=tracking))
    whose = f"ClusterLoRARuntime of-{run.namespace}" if listed else "a ClusterLoRARuntime"
    message = refusal(run)
    assert f"spec.{field} is https://" in message
    assert f"add it to endpoints.tracking of {whose}" in message


@pytest.mark.parametrize("store", ["s3://models/adapters/other", "s3://models/adapters/other/deeper"])
def test_publishing_as_another_namespace(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime, store: str
) -> None:
    """Attack: a user publishes below another namespace's prefix, where its servers look for adapters."""
    run.create(changed(put_runtime(store="s3://models/adapters"), publish={"store": store}))
    message = refusal(run)
    assert f"spec.publish.store is {store}, but below s3://models/adapters a run may publish only to" in message
    assert f"below s3://models/adapters/{run.namespace}" in message


def test_a_name_that_makes_the_prefix_of_another_namespace(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime
) -> None:
    """Attack: a store above the allowed one, with namespace and name chosen so that the files end up in another's."""
    name = put_runtime(store=f"s3://models/{run.namespace}", limits={"storePrefixes": ["s3://models"]})
    run.create(changed(name, publish={"store": "s3://models", "name": "other"}))
    assert f"below s3://models/{run.namespace} a run may publish only to" in refusal(run)


@pytest.mark.parametrize("with_runtime", [False, True])
@pytest.mark.parametrize("below", ["other/support/checkpoints/u-1/step-40", "{}-b/support/checkpoints/u-1", "", "{}"])
def test_a_checkpoint_of_another_namespace(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime, below: str, with_runtime: bool
) -> None:
    """Attack: a user goes on from what another namespace's run has learned, and publishes it as an adapter."""
    uri = f"s3://models/adapters/{below.format(run.namespace)}".rstrip("/")
    name = put_runtime(store="s3://models/adapters", limits={"storePrefixes": ["s3://models"]})
    change = changed(name, checkpoint={"resumeFrom": {"uri": uri}})
    run.create(change if with_runtime else lambda spec: spec.update(checkpoint={"resumeFrom": {"uri": uri}}))
    message = refusal(run)
    assert f"spec.checkpoint.resumeFrom.uri is {uri}, but a run of namespace {run.namespace} may go on only" in message


METADATA = {
    "a role in the cloud by kube2iam": ("annotations", "iam.amazonaws.com/role", "admin"),
    "a second network by Multus": ("annotations", "k8s.v1.cni.cncf.io/networks", "storage"),
    "a sidecar's settings by Istio": ("annotations", "sidecar.istio.io/inject", "true"),
    "an identity by Azure workload identity": ("labels", "azure.workload.identity/use", "true"),
    "an identity by Azure pod identity": ("labels", "aadpodidbinding", "admin"),
}


@pytest.mark.parametrize("case", METADATA)
@pytest.mark.parametrize("with_runtime", [False, True])
def test_an_identity_or_a_network_through_metadata(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime, case: str, with_runtime: bool
) -> None:
    """Attack: a user gives the pods an annotation or a label that another controller acts on."""
    field, key, value = METADATA[case]
    limits = {"annotationNames": ["kueue.x-k8s.io/*"], "labelNames": ["team"]}
    name = put_runtime(limits=limits) if with_runtime else (lambda spec: None)
    run.create(changed(name, podTemplate={field: {key: value}}))
    assert f"spec.podTemplate.{field} has {key}, which is not allowed: add it to limits." in refusal(run)


def test_a_priority_that_evicts_others(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    """Attack: a user gives the pods a priority by which the scheduler takes nodes away from others."""
    run.create(lambda spec: spec.update(runPolicy={"priorityClassName": "system-node-critical"}))
    assert "spec.runPolicy.priorityClassName is system-node-critical" in refusal(run)
    other = Run(run.api, run.namespace, "other")
    name = put_runtime(limits={"priorityClassNames": ["batch-low"]})
    other.create(changed(name, runPolicy={"priorityClassName": "urgent"}))
    assert "only batch-low is allowed: limits.priorityClassNames" in refusal(other)


def test_gpus_under_another_name(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    """Attack: a user asks for slices of GPUs, which maxGPUs did not count."""
    name = put_runtime(limits={"maxGPUs": 8})
    limits = {"nvidia.com/mig-1g.10gb": "5"}
    run.create(changed(name, podTemplate={"resources": {"limits": limits}}))
    assert "ask for 10 GPUs (nodes * (gpusPerNode + nvidia.com/mig-1g.10gb))" in refusal(run)


def test_no_queue(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    """Attack: a user leaves out the queue, and with it the quota of the team."""
    run.create(put_runtime(limits={"queueRequired": True}))
    assert "spec.runPolicy.queueName is not set" in refusal(run)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_runtime_of_other_namespaces(
    api: Api, run: Run, operator: OperatorThread, put_runtime: PutRuntime, by_name: bool
) -> None:
    """Attack: a user takes a runtime that an administrator made for another team, or gets it as the default one."""
    name = put_runtime(allowedNamespaces={"matchLabels": {"tier": "gold"}})
    if not by_name:
        default = api.create(
            "/apis/lorafinetune.io/v1alpha1/clusterloraruntimes",
            {
                "apiVersion": "lorafinetune.io/v1alpha1", "kind": "ClusterLoRARuntime", "metadata": {"name": "default"},
                "spec": {"allowedNamespaces": {"matchLabels": {"tier": "gold"}}},
            },
        )  # fmt: skip
        operator.knows(default)
    try:
        run.create(name if by_name else lambda spec: None)
        assert "is for namespaces with the labels tier=gold only (allowedNamespaces)" in refusal(run)
        api.patch(f"/api/v1/namespaces/{run.namespace}", {"metadata": {"labels": {"tier": "gold"}}})
        other = Run(run.api, run.namespace, "other").create(name if by_name else lambda spec: None)
        other.gang(1)
    finally:
        if not by_name:
            api.delete("/apis/lorafinetune.io/v1alpha1/clusterloraruntimes/default")


SWAPPED = {
    "image": "attacker.test/trainer:evil",
    "endpoints": {"store": "http://attacker.test"},
    "podTemplate": {"env": [{"name": "LD_PRELOAD", "value": "/evil.so"}]},
}


def check_kept(pod: Raw) -> None:
    """A pod is as the runtime said when the run took it."""
    [container] = pod["spec"]["containers"]
    found = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert container["image"] == "trainer:good"
    assert found["AWS_ENDPOINT_URL"] == "https://s3.example.org"
    assert "LD_PRELOAD" not in found


GOOD: Raw = {"image": "trainer:good", "endpoints": {"store": "https://s3.example.org"}}


def test_a_runtime_that_is_swapped_while_a_run_is_in_its_preflight(
    run: Run, fast_settings: Callable[..., Settings], put_runtime: PutRuntime
) -> None:
    """Attack: somebody changes the runtime between the checks of a run and its first attempt."""
    with OperatorThread(fast_settings(run.namespace, preflight="on")):
        run.create(put_runtime(**GOOD))
        [pod] = eventually("a preflight", lambda: run.preflight_pods(1))
        check_kept(pod)
        put_runtime(**SWAPPED)
        run.set_preflight(1, ended(0, settled(), "Completed"))
        for pod in run.gang(1):
            check_kept(pod)


def test_a_runtime_that_is_swapped_while_a_run_is_in_its_queue(
    api: Api, run: Run, operator: OperatorThread, put_runtime: PutRuntime
) -> None:
    """Attack: somebody deletes the runtime of a run that waits for quota, and makes another one of that name."""
    name = put_runtime(**GOOD)
    run.create(changed(name, runPolicy={"queueName": "team"}))
    run.wait_phase("Queued")
    put_runtime(**SWAPPED)
    api.patch(f"/apis/batch/v1/namespaces/{run.namespace}/jobs/run-1", {"spec": {"suspend": False}})
    for pod in run.gang(1):
        check_kept(pod)
    run.set_failed(1, "StoreUnavailable", 74)
    eventually("attempt 2", lambda: run.status["attempt"] == 2)
    api.patch(f"/apis/batch/v1/namespaces/{run.namespace}/jobs/run-2", {"spec": {"suspend": False}})
    for pod in run.gang(2):
        check_kept(pod)


def test_a_deadline_that_is_raised_past_the_limit(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    """Attack: a user raises the deadline of a run that lives, which is not checked again, and edits of the runtime."""
    name = put_runtime(limits={"maxActiveDeadlineSeconds": 2})
    run.create(changed(name, runPolicy={"activeDeadlineSeconds": 2}))
    run.set_running(1)
    run.wait_phase("Running")
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"activeDeadlineSeconds": 86400}}})
    put_runtime(limits={"maxActiveDeadlineSeconds": 86400})
    status = run.wait_phase("Failed")
    assert status["reason"] == "DeadlineExceeded"
    message = run.condition("Stalled")["message"]
    assert f"the most that ClusterLoRARuntime of-{run.namespace} allows (limits.maxActiveDeadlineSeconds)" in message


def test_a_run_without_a_deadline_under_a_limit(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    """Attack: a user leaves out the deadline, so that nothing is longer than the limit."""
    run.create(put_runtime(limits={"maxActiveDeadlineSeconds": 2}))
    run.set_running(1)
    assert run.wait_phase("Failed")["reason"] == "DeadlineExceeded"
