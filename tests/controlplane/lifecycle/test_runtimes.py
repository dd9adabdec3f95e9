"""What a run takes from its ClusterLoRARuntime, and keeps, on a real API server and Job controller."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lora_operator.kube.client import KubeClient
from lora_operator.settings import Settings
from lora_operator.watched.cache import Resource
from tests.support.api import Api, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, settled
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

PATH = "/apis/lorafinetune.io/v1alpha1/clusterloraruntimes"
HEAD = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "ClusterLoRARuntime"}

PutRuntime = Callable[..., str]


@pytest.fixture
def put_runtime(api: Api, namespace: str) -> Iterator[PutRuntime]:
    """Creates or changes a runtime; returns its name, which no other test has unless it is given."""
    made: dict[str, None] = {}

    def put(name: str = f"of-{namespace}", **spec: Any) -> str:
        if name in made:
            api.patch(f"{PATH}/{name}", {"spec": spec})
        else:
            api.create(PATH, {**HEAD, "metadata": {"name": name}, "spec": spec})
            made[name] = None
        return name

    yield put
    for name in made:
        api.delete(f"{PATH}/{name}")


def naming(runtime: str, **more: Any) -> Callable[[Raw], None]:
    return lambda spec: spec.update(runtimeRef={"name": runtime}, **more)


def image(run: Run, attempt: int) -> str:
    """The image of the pods of ``attempt``."""
    return str(run.gang(attempt)[0]["spec"]["containers"][0]["image"])


def words(run: Run, attempt: int) -> tuple[str, str]:
    return image(run, attempt), run.document(attempt)["publish"]["store"]


def test_a_run_gets_what_its_runtime_says(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    name = put_runtime(
        image="trainer:of-the-runtime",
        imagePullPolicy="Always",
        gpu={"name": "H100", "memoryGiB": 79.6, "nodeSelector": {"gpu": "h100"}},
        podTemplate={
            "resources": {"requests": {"rdma/hca": "1"}, "limits": {"rdma/hca": "1"}},
            "nodeSelector": {"pool": "training"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}],
        },
        store="s3://of/runtime",
        checkpoint={"everyMinutes": 15},
        terminationGracePeriodSeconds=77,
    )
    run.create(naming(name, publish={}, parallelism={"nodes": 2, "gpusPerNode": 1}))
    pod = run.gang(1)[0]["spec"]
    container = pod["containers"][0]
    assert (container["image"], container["imagePullPolicy"]) == ("trainer:of-the-runtime", "Always")
    assert container["resources"]["limits"] == {"rdma/hca": "1", "nvidia.com/gpu": "1"}
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in container["env"]
    assert (pod["nodeSelector"], pod["terminationGracePeriodSeconds"]) == ({"pool": "training", "gpu": "h100"}, 77)
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]
    told = run.document(1)
    assert (told["publish"]["store"], told["checkpoint"]) == ("s3://of/runtime", {"everyMinutes": 15})
    assert told["device"] == {"name": "H100", "memoryGiB": 79.6}
    status = run.wait_phase("Starting")
    assert (status["runtime"]["name"], status["runtime"]["generation"]) == (name, 1)
    kinds = [call.split("/")[-1] for call in operator.calls if not call.startswith("GET ")]
    assert kinds[:LAUNCH] == ["status", "networkpolicies", "services", "jobs", "status"]


def test_an_edit_concerns_no_run_that_has_begun(
    api: Api, run: Run, operator: OperatorThread, put_runtime: PutRuntime
) -> None:
    old = "trainer:old", "s3://old"
    name = put_runtime(image=old[0], store=old[1])
    run.create(naming(name, publish={}))
    assert words(run, 1) == old
    put_runtime(name, image="trainer:new", store="s3://new", limits={"maxNodes": 1})
    run.set_failed(1, "StoreUnavailable", 74)
    run.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert words(run, 2) == old
    api.delete(f"{PATH}/{name}")
    run.set_failed(2, "StoreUnavailable", 74)
    run.wait("attempt 3", lambda status: status.get("attempt") == 3)
    assert words(run, 3) == old
    assert run.status["runtime"]["generation"] == 1
    run.set_succeeded(3, store=old[1])
    run.wait_phase("Succeeded")
    api.create(PATH, {**HEAD, "metadata": {"name": name}, "spec": {}})


def test_a_run_that_asks_for_too_much_is_refused_by_the_rule(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime
) -> None:
    name = put_runtime(limits={"maxGPUs": 8, "dataUriPrefixes": ["s3://datasets"]})
    run.create(naming(name, parallelism={"nodes": 2, "gpusPerNode": 8}, training={"epochs": 1, "globalBatchSize": 16}))
    status = run.wait_phase("Failed")
    assert (status["reason"], status["runtime"]["name"]) == ("RuntimeRefused", name)
    message = run.condition("Stalled")["message"]
    assert f"asks for 16 GPUs (nodes * gpusPerNode), but ClusterLoRARuntime {name} allows at most 8" in message
    assert "(limits.maxGPUs)" in message
    assert "spec.dataset.train.uri is s3://models/train.jsonl, but " in message
    assert "(limits.dataUriPrefixes). Remedy: Stay within the limits" in message
    assert (run.jobs(), run.services(), run.policies()) == ([], [], [])
    eventually("an Event", lambda: [event["reason"] for event in run.events()] == ["RuntimeRefused"])
    put_runtime(name, limits={"maxGPUs": 64, "dataUriPrefixes": None})
    operator.knows(run.api.get(f"{PATH}/{name}"))
    other = Run(run.api, run.namespace, "other").create(naming(name))
    other.wait_phase("Starting")
    assert run.status["phase"] == "Failed", "what has ended stays so"


def test_a_run_goes_on_from_checkpoints_of_its_own_namespace_alone(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime
) -> None:
    name = put_runtime(store="s3://models/adapters", checkpoint={"retainHours": 24})
    uri = f"s3://models/adapters/{run.namespace}/old/checkpoints/u-1/step-40"
    run.create(naming(name, publish={}, checkpoint={"resumeFrom": {"uri": uri}}))
    run.gang(1)
    assert run.document(1)["checkpoint"] == {"retainHours": 24, "resumeFrom": {"uri": uri}}
    by_name = Run(run.api, run.namespace, "by-name")
    by_name.create(naming(name, checkpoint={"resumeFrom": {"name": "by-name"}}))
    by_name.gang(1)
    assert by_name.document(1)["checkpoint"]["resumeFrom"] == {"name": "by-name"}
    other = Run(run.api, run.namespace, "other")
    other.create(naming(name, checkpoint={"resumeFrom": {"uri": "s3://models/adapters/others/old/checkpoints/u-1"}}))
    assert other.wait_phase("Failed")["reason"] == "RuntimeRefused"
    message = other.condition("Stalled")["message"]
    assert "spec.checkpoint.resumeFrom.uri is s3://models/adapters/others/old/checkpoints/u-1, but " in message
    assert f"below s3://models/adapters/{run.namespace}: copy the checkpoint there" in message
    assert (other.jobs(), other.services(), other.policies()) == ([], [], [])


def test_without_a_runtime_too(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(checkpoint={"resumeFrom": {"uri": "s3://models/adapters/others/old"}}))
    assert run.wait_phase("Failed")["reason"] == "RuntimeRefused"
    assert f"only from checkpoints below s3://models/adapters/{run.namespace}" in run.condition("Stalled")["message"]
    assert run.jobs() == []


def test_a_missing_runtime_is_waited_for(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    run.create(naming(f"of-{run.namespace}"))
    run.wait("a word", lambda status: status.get("reason") == "RuntimeNotFound")
    condition = run.condition("Ready")
    assert condition["message"].startswith(f"spec.runtimeRef.name: there is no ClusterLoRARuntime of-{run.namespace}. ")
    assert (run.status["phase"], run.jobs()) == ("Pending", [])
    assert run.condition("Stalled")["status"] == "False"
    eventually("an Event", lambda: [event["reason"] for event in run.events()] == ["RuntimeNotFound"])
    put_runtime(image="trainer:at-last")
    assert image(run, 1) == "trainer:at-last"
    run.wait_phase("Starting")


def test_a_run_does_not_begin_with_a_snapshot_that_holds_a_rule_of_a_newer_version(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime
) -> None:
    """As after a rollback: the newer operator had taken the runtime, and created nothing yet."""
    run.create(naming(put_runtime(), runPolicy={"suspend": True}))
    run.wait_phase("Suspended")
    egress = [{"namespaceSelector": {"matchExpressions": [{"key": "store", "operator": "Exists"}]}}]
    taken = {"runtime": {"name": "h100", "generation": 1, "spec": {"egress": egress}}}
    run.api.patch(f"{run.path}/{run.name}/status", {"status": taken})
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": False}}})
    status = run.wait("it does not begin", lambda status: status["reason"] == "InvalidSpec")
    assert (run.jobs(), run.policies(), status["runtime"]["spec"]) == ([], [], {"egress": egress})
    assert "egress.0.namespaceSelector.matchExpressions" in run.condition("Stalled")["message"]
    egress[0]["namespaceSelector"] = {}  # the newer version is back
    run.api.patch(f"{run.path}/{run.name}/status", {"status": taken})
    run.gang(1)


@pytest.mark.parametrize("call", ["fetch_object", "patch_status"])
def test_a_run_that_is_put_right_while_it_is_found_wrong_is_looked_at_again_at_once(
    run: Run, settings: Settings, put_runtime: PutRuntime, call: str
) -> None:
    """What the operator fetches of it is no news to the watch any more, which here tells nothing at all."""
    run.create(naming(put_runtime(), runPolicy={"suspend": True}))
    with OperatorThread(settings):
        run.wait_phase("Suspended")
    egress: list[Raw] = [{"namespaceSelector": {"matchExpressions": [{"key": "store", "operator": "Exists"}]}}]
    taken = {"runtime": {"name": "h100", "generation": 1, "spec": {"egress": egress}}}
    run.api.patch(f"{run.path}/{run.name}/status", {"status": taken})
    run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": False}}})
    put_right: list[str] = []

    def put_it_right() -> None:
        egress[0]["namespaceSelector"] = {}
        run.api.patch(f"{run.path}/{run.name}/status", {"status": taken})

    def meet(client: KubeClient) -> None:
        whole = getattr(client, call)

        async def answer(*args: Any) -> Any:
            if not put_right:
                put_right.append(call)
                await asyncio.to_thread(put_it_right)
            return await whole(*args)

        setattr(client, call, answer)

    thread = OperatorThread(settings, wrap=meet)
    untold = list[Any]()
    thread.operator._on_event = lambda *event: untold.append(event)  # type: ignore[method-assign]
    with thread:
        eventually("its Job", run.jobs)
        eventually("the watches had news", lambda: untold)
    assert put_right == [call], "it was found wrong, and by this call it was not any more"
    writes = [one for one in thread.calls if not one.startswith("GET ")]
    assert writes[0].endswith("/status") is (call == "patch_status"), "what is news already is not written over"


def test_a_run_without_a_store_anywhere_is_refused(run: Run, operator: OperatorThread) -> None:
    run.create(lambda spec: spec.update(publish={}))
    assert run.wait_phase("Failed")["reason"] == "BadSpec"
    assert "spec.publish.store is not set, and there is no runtime" in run.condition("Stalled")["message"]


def test_the_operator_applies_the_default_runtime_and_runs_take_it(
    api: Api, run: Run, fast_settings: Callable[..., Settings], put_runtime: PutRuntime
) -> None:
    before = Run(api, run.namespace, "before").create()
    with OperatorThread(fast_settings(run.namespace)):
        before.set_running(1)
        before.wait_phase("Running")
    put_runtime("default", image="trainer:by-hand", store="s3://by/hand")
    settings = fast_settings(run.namespace, default_runtime='{"image": "trainer:of-the-chart"}')
    with OperatorThread(settings):
        run.create()
        assert image(run, 1) == "trainer:of-the-chart"
        found = api.get(f"{PATH}/default")
        assert (found["spec"]["image"], found["spec"]["store"]) == ("trainer:of-the-chart", "s3://by/hand")
        before.set_failed(1, "StoreUnavailable", 74)
        before.wait("attempt 2", lambda status: status.get("attempt") == 2)
        assert image(before, 2) == settings.trainer_image, "it began without a runtime, and stays without one"
        assert "runtime" not in before.status


def test_the_time_to_live_of_the_runtime_clears_up(run: Run, operator: OperatorThread, put_runtime: PutRuntime) -> None:
    run.create(naming(put_runtime(ttlSecondsAfterFinished=0)))
    run.set_running(1)
    run.wait_phase("Running")
    run.set_succeeded(1)
    run.wait_phase("Succeeded")
    eventually("nothing left", lambda: (run.jobs(), run.services()) == ([], []))


def test_the_preflight_has_the_same_runtime_as_the_attempts(
    run: Run, fast_settings: Callable[..., Settings], put_runtime: PutRuntime
) -> None:
    name = put_runtime(image="trainer:1", store="s3://one", gpu={"name": "H100", "memoryGiB": 79.6})
    with OperatorThread(fast_settings(run.namespace, preflight="on")):
        run.create(naming(name, publish={}, parallelism={"nodes": 2, "gpusPerNode": 1}))
        (job,) = eventually("the preflight", run.jobs)
        assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "trainer:1"
        told = run.document("pre1")
        assert (told["device"]["memoryGiB"], told["publish"]["store"]) == (79.6, "s3://one")
        put_runtime(name, image="trainer:2", store="s3://two")
        run.set_preflight(1, ended(0, settled(), "Completed"))
        assert words(run, 1) == ("trainer:1", "s3://one")
        assert run.document(1)["device"] == told["device"]


@pytest.mark.parametrize(("setting", "said", "phase"), [("on", False, "Starting"), ("off", True, "Preflight")])
def test_a_runtime_turns_the_preflight_on_or_off(
    run: Run, fast_settings: Callable[..., Settings], put_runtime: PutRuntime, setting: str, said: bool, phase: str
) -> None:
    with OperatorThread(fast_settings(run.namespace, preflight=setting)):
        run.create(naming(put_runtime(preflight=said)))
        run.wait_phase(phase)


LISTS = len(Resource)
LAUNCH = 5
"""Calls of a launch: the snapshot, NetworkPolicy, Service, Job, status."""


def test_an_operator_cut_after_any_call_of_a_launch_leaves_one_runtime_for_all_attempts(
    api: Api, make_namespace: Callable[[], str], fast_settings: Callable[..., Settings]
) -> None:
    """The runtime is edited before the next operator starts."""

    def live_with_cut(k: int) -> list[tuple[str, str]]:
        namespace = make_namespace()
        name, run = f"of-{namespace}", Run(api, namespace)
        api.create(PATH, {**HEAD, "metadata": {"name": name}, "spec": {"image": "trainer:1", "store": "s3://one"}})
        run.create(naming(name, publish={}))
        settings = fast_settings(namespace, log_interval=60.0, progress_interval=60.0)
        first = OperatorThread(settings, cut_after=k).start()
        try:
            eventually("the cut", lambda: first.is_cut)
        finally:
            first.stop()
        api.patch(f"{PATH}/{name}", {"spec": {"image": "trainer:2", "store": "s3://two"}})
        with OperatorThread(settings):
            found = [words(run, 1)]
            run.set_failed(1, "StoreUnavailable", 74)
            found.append(words(run, 2))
        spec = run.status["runtime"]["spec"]
        api.delete(f"{PATH}/{name}")
        return [*found, (spec["image"], spec["store"])]

    cuts = range(LISTS, LISTS + LAUNCH + 1)
    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(cuts, pool.map(live_with_cut, cuts), strict=True))
    assert found.pop(LISTS) == [("trainer:2", "s3://two")] * 3, "nothing was taken before the cut"
    assert found == {k: [("trainer:1", "s3://one")] * 3 for k in found}


def test_two_operators_that_see_different_runtimes_make_one_run(
    run: Run, settings: Settings, put_runtime: PutRuntime
) -> None:
    """One of them sees the runtime as it was before it was edited."""
    name = put_runtime(image="trainer:1", store="s3://one")

    def see_the_old_one(client: KubeClient) -> None:
        whole = client.fetch_list

        async def fetch_list(resource: str, *args: Any) -> Any:
            async for item in whole(resource, *args):
                if resource == Resource.RUNTIMES and item["metadata"]["name"] == name:
                    item["metadata"]["resourceVersion"] = str(2**60)  # later than all that the watch will show
                yield item

        client.fetch_list = fetch_list  # type: ignore[method-assign]

    with OperatorThread(settings, wrap=see_the_old_one) as stale:
        eventually("ready", lambda: stale.operator.ready)
        put_runtime(name, image="trainer:2", store="s3://two")
        with OperatorThread(settings) as fresh:
            eventually("ready", lambda: fresh.operator.ready)
            run.create(naming(name, publish={}))
            found = [words(run, 1)]
            run.set_failed(1, "StoreUnavailable", 74)
            found.append(words(run, 2))
        seen = stale.operator.cache.runtime(name)
        assert seen is not None
        assert seen["spec"]["image"] == "trainer:1", "the one has not seen the edit"
    spec = run.status["runtime"]["spec"]
    assert found == [(spec["image"], spec["store"])] * 2


def test_requests_above_limits_are_said_by_the_operator(
    run: Run, operator: OperatorThread, put_runtime: PutRuntime
) -> None:
    """The API server takes numbers with a point, and cannot compare them."""
    much = {"requests": {"cpu": 2.5}, "limits": {"cpu": 2}}
    name = put_runtime(podTemplate={"resources": much})
    run.create(naming(name))
    status = run.wait("what is wrong", lambda status: status.get("reason") == "InvalidSpec")
    assert status["phase"] == "Pending"
    words = run.condition("Ready")["message"]
    assert words.startswith(f"ClusterLoRARuntime {name}: spec.podTemplate.resources.requests.cpu is 2.5: requests may")
    put_runtime(name, podTemplate={"resources": {"requests": {"cpu": 0.5}, "limits": {"cpu": 1.5}}})
    resources = run.gang(1)[0]["spec"]["containers"][0]["resources"]
    assert resources == {"requests": {"cpu": "500m"}, "limits": {"cpu": "1500m"}}

    other = Run(run.api, run.namespace, "other").create(naming(name, podTemplate={"resources": much}))
    status = other.wait("the end", lambda status: status.get("phase") == "Failed")
    assert status["reason"] == "BadSpec"
    assert status["failures"][0]["message"].startswith("spec.podTemplate.resources.requests.cpu is 2.5")
