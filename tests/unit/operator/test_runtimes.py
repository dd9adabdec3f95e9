"""What a run takes from its runtime, what wins, and what is refused: one row for each rule."""

from typing import Any

import pytest

from lora_api import ClusterLoRARuntime, FailureClass, LoRAFineTune, build_run_spec
from lora_api.run import Device
from lora_operator.children.job import build_job
from lora_operator.lifecycle.runtime import find_refusal
from lora_operator.policies.limits import check_limits
from lora_operator.settings import Settings
from lora_operator.state.runtimes import build_snapshot, fill_in, resolve
from lora_operator.watched.documents import runtime_name
from tests.unit.operator.builders import a_run, a_runtime

SETTINGS = Settings(trainer_image="trainer:of-the-operator", termination_grace=120)


def taken(runtime: ClusterLoRARuntime, **spec: Any) -> LoRAFineTune:
    """A run that took ``runtime``, as it is read afterwards."""
    return fill_in(a_run(status={"runtime": build_snapshot(runtime).to_wire()}, **spec))


def value_at(run: LoRAFineTune, path: str) -> Any:
    value: Any = run.spec.to_wire()
    for part in path.split("."):
        value = value.get(part)
    return value


POOL = {"key": "pool", "operator": "Exists"}
GPUS = {"nodes": 2, "gpusPerNode": 8}
H100 = {"name": "H100", "memoryGiB": 79.6, "nodeSelector": {"gpu": "h100"}}

# A sentence that says the case: what the runtime says, what the run says, a field, and what it is in the end.
MERGED: dict[str, tuple[dict[str, Any], dict[str, Any], str, Any]] = {
    "nothing is filled in by an empty runtime": ({}, {}, "podTemplate.nodeSelector", {}),
    "the runtime's store": ({"store": "s3://of/runtime"}, {"publish": {}}, "publish.store", "s3://of/runtime"),
    "the run's store wins": (
        {"store": "s3://of/runtime"},
        {"publish": {"store": "s3://own"}},
        "publish.store",
        "s3://own",
    ),
    "the rest of publish is the run's": (
        {"store": "s3://of/runtime"},
        {"publish": {"name": "tickets"}},
        "publish.name",
        "tickets",
    ),
    "the runtime's checkpoints": (
        {"checkpoint": {"everyMinutes": 15, "keep": 3}},
        {},
        "checkpoint",
        {"everyMinutes": 15, "keep": 3},
    ),
    "a run that says when is not saved at other times too": (
        {"checkpoint": {"everyMinutes": 15, "keep": 3}},
        {"checkpoint": {"everySteps": 10}},
        "checkpoint",
        {"everySteps": 10, "keep": 3},
    ),
    "a run that says how many keeps the runtime's times": (
        {"checkpoint": {"everyMinutes": 15, "keep": 3}},
        {"checkpoint": {"keep": 1}},
        "checkpoint",
        {"everyMinutes": 15, "keep": 1},
    ),
    "the runtime's time to live": ({"ttlSecondsAfterFinished": 60}, {}, "runPolicy.ttlSecondsAfterFinished", 60),
    "the run's time to live wins, 0 too": (
        {"ttlSecondsAfterFinished": 60},
        {"runPolicy": {"ttlSecondsAfterFinished": 0}},
        "runPolicy.ttlSecondsAfterFinished",
        0,
    ),
    "the runtime's queue": ({"queueName": "all"}, {}, "runPolicy.queueName", "all"),
    "the run's queue wins": ({"queueName": "all"}, {"runPolicy": {"queueName": "own"}}, "runPolicy.queueName", "own"),
    "the rest of the policy is the run's": (
        {"ttlSecondsAfterFinished": 60},
        {"runPolicy": {"maxRestarts": 7}},
        "runPolicy.maxRestarts",
        7,
    ),
    "labels of nodes are joined, and the run's win": (
        {"podTemplate": {"nodeSelector": {"pool": "a", "zone": "1"}}},
        {"podTemplate": {"nodeSelector": {"pool": "b"}}},
        "podTemplate.nodeSelector",
        {"pool": "b", "zone": "1"},
    ),
    "nodes with the GPU are asked for by runs with GPUs": (
        {"gpu": H100, "podTemplate": {"nodeSelector": {"pool": "a"}}},
        {"parallelism": GPUS, "training": {"maxSteps": 1, "globalBatchSize": 16}},
        "podTemplate.nodeSelector",
        {"pool": "a", "gpu": "h100"},
    ),
    "and not by runs on CPUs": (
        {"gpu": H100, "podTemplate": {"nodeSelector": {"pool": "a"}}},
        {},
        "podTemplate.nodeSelector",
        {"pool": "a"},
    ),
    "tolerations are those of both, each once": (
        {"podTemplate": {"tolerations": [POOL]}},
        {"podTemplate": {"tolerations": [{"key": "own", "operator": "Exists"}, POOL]}},
        "podTemplate.tolerations",
        [POOL, {"key": "own", "operator": "Exists"}],
    ),
    "the runtime's longest deadline is that of a run without one": (
        {"limits": {"maxActiveDeadlineSeconds": 600}},
        {},
        "runPolicy.activeDeadlineSeconds",
        600,
    ),
    "a shorter deadline of the run is its own": (
        {"limits": {"maxActiveDeadlineSeconds": 600}},
        {"runPolicy": {"activeDeadlineSeconds": 60}},
        "runPolicy.activeDeadlineSeconds",
        60,
    ),
    "a deadline that was raised later ends at the runtime's longest": (
        {"limits": {"maxActiveDeadlineSeconds": 600}},
        {"runPolicy": {"activeDeadlineSeconds": 6000}},
        "runPolicy.activeDeadlineSeconds",
        600,
    ),
    "secrets of registries are those of both, each once": (
        {"podTemplate": {"imagePullSecrets": [{"name": "a"}]}},
        {"podTemplate": {"imagePullSecrets": [{"name": "b"}, {"name": "a"}]}},
        "podTemplate.imagePullSecrets",
        [{"name": "a"}, {"name": "b"}],
    ),
    "labels and annotations are joined": (
        {"podTemplate": {"labels": {"team": "ml"}, "annotations": {"a": "1"}}},
        {"podTemplate": {"labels": {"team": "support"}, "annotations": {"b": "2"}}},
        "podTemplate.labels",
        {"team": "support"},
    ),
    "resources that only the runtime names are its own": (
        {"podTemplate": {"resources": {"limits": {"rdma/hca": "1"}}}},
        {"podTemplate": {"resources": {"requests": {"cpu": "8"}}}},
        "podTemplate.resources",
        {"requests": {"cpu": "8"}, "limits": {"rdma/hca": "1"}},
    ),
    "a resource that the run requests is not limited below it by the runtime": (
        {"podTemplate": {"resources": {"requests": {"memory": "64Gi"}, "limits": {"memory": "64Gi"}}}},
        {"podTemplate": {"resources": {"requests": {"memory": "128Gi"}}}},
        "podTemplate.resources",
        {"requests": {"memory": "128Gi"}, "limits": {}},
    ),
    "a resource that the run limits is not requested above it by the runtime": (
        {"podTemplate": {"resources": {"requests": {"memory": "64Gi", "cpu": "8"}}}},
        {"podTemplate": {"resources": {"limits": {"memory": "8Gi"}}}},
        "podTemplate.resources",
        {"requests": {"cpu": "8"}, "limits": {"memory": "8Gi"}},
    ),
}


@pytest.mark.parametrize("case", MERGED)
def test_the_run_wins_over_its_runtime(case: str) -> None:
    runtime, spec, path, want = MERGED[case]
    assert value_at(taken(a_runtime(**runtime), **spec), path) == want


def test_a_run_without_a_runtime_is_left_alone() -> None:
    run = a_run(status={"attempt": 1})
    assert fill_in(run) is run
    assert resolve(run, SETTINGS) == SETTINGS.for_runs()


def test_what_is_filled_in_is_never_more_than_a_run_may_say() -> None:
    """A filled-in specification is read again as it is, but for the number of entries."""
    runtime = a_runtime(**{case: value for row in MERGED.values() for case, value in row[0].items()})
    run = taken(runtime, parallelism=GPUS, training={"maxSteps": 1, "globalBatchSize": 16})
    assert LoRAFineTune.model_validate(run.to_wire()) == run


# -- Settings ----------------------------------------------------------------------------------------------------------


def test_the_runtime_wins_over_the_operators_settings() -> None:
    runtime = a_runtime(image="trainer:7", imagePullPolicy="Always", terminationGracePeriodSeconds=300)
    found = resolve(taken(runtime), SETTINGS)
    assert (found.trainer_image, found.trainer_image_pull_policy, found.termination_grace) == (
        "trainer:7",
        "Always",
        300,
    )
    assert found.failure_grace == SETTINGS.failure_grace


@pytest.mark.parametrize("setting", ["on", "off"])
@pytest.mark.parametrize(("said", "want"), [({}, None), ({"preflight": True}, "on"), ({"preflight": False}, "off")])
def test_the_runtime_turns_the_preflight_on_or_off(setting: Any, said: dict[str, Any], want: str | None) -> None:
    assert resolve(taken(a_runtime(**said)), Settings(preflight=setting)).preflight == (want or setting)


def test_what_the_runtime_does_not_say_is_the_operators() -> None:
    assert resolve(taken(a_runtime()), SETTINGS) == SETTINGS.for_runs()


def test_the_pods_get_it() -> None:
    runtime = a_runtime(
        image="trainer:7",
        terminationGracePeriodSeconds=300,
        podTemplate={"env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}], "resources": {"limits": {"rdma/hca": "1"}}},
    )
    run = taken(runtime)
    pod = build_job(run, 1, resolve(run, SETTINGS))["spec"]["template"]["spec"]
    container = pod["containers"][0]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (container["image"], pod["terminationGracePeriodSeconds"]) == ("trainer:7", 300)
    assert (environment["NCCL_IB_HCA"], environment["LORA_STOP_GRACE_SECONDS"]) == ("mlx5", "290")
    assert container["resources"]["limits"] == {"rdma/hca": "1"}


DEVICES: dict[str, tuple[dict[str, Any], dict[str, Any], Device | None]] = {
    "the GPU of the runtime": ({"gpu": H100}, GPUS, Device(name="H100", memory_gib=79.6)),
    "no GPUs": ({"gpu": H100}, {"gpusPerNode": 0}, None),
    "a runtime that knows none": ({}, GPUS, None),
}


@pytest.mark.parametrize("case", DEVICES)
def test_memory_is_planned_for_the_gpu_of_the_runtime(case: str) -> None:
    runtime, parallelism, want = DEVICES[case]
    run = taken(a_runtime(**runtime), parallelism=parallelism, training={"maxSteps": 1, "globalBatchSize": 16})
    assert build_run_spec(run, 1).device == want


def test_memory_is_not_planned_for_nodes_that_the_run_does_not_ask_for() -> None:
    elsewhere = {"nodeSelector": {"gpu": "a10"}}
    run = taken(a_runtime(gpu=H100), parallelism={"gpusPerNode": 1}, podTemplate=elsewhere)
    assert build_run_spec(run, 1).device is None


# -- Limits ------------------------------------------------------------------------------------------------------------

WHOSE = "ClusterLoRARuntime h100 allows"
ALLOWED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no limit": ({}, {"parallelism": {"nodes": 64, "gpusPerNode": 8}}),
    "as many nodes as there may be": ({"maxNodes": 2}, {"parallelism": {"nodes": 2}}),
    "as many GPUs as there may be": ({"maxGPUs": 16}, {"parallelism": GPUS}),
    "CPUs where no GPU is allowed": ({"maxGPUs": 0}, {"parallelism": {"nodes": 4, "gpusPerNode": 0}}),
    "a model below a prefix": ({"modelUriPrefixes": ["s3://models"]}, {}),
    "a model that is the prefix": ({"modelUriPrefixes": ["s3://models/base"]}, {}),
    "a model below the second prefix": ({"modelUriPrefixes": ["hf://meta-llama", "s3://models/"]}, {}),
    "a whole kind of place": ({"modelUriPrefixes": ["s3://"], "dataUriPrefixes": ["s3://"]}, {}),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_within_the_limits_is_not_refused(case: str) -> None:
    limits, spec = ALLOWED[case]
    assert check_limits(a_run(**spec), a_runtime("h100", limits=limits)) == []


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "too many nodes": (
        {"maxNodes": 4},
        {"parallelism": {"nodes": 8, "gpusPerNode": 0}},
        [f"spec.parallelism.nodes is 8, but {WHOSE} at most 4 (limits.maxNodes)"],
    ),
    "too many GPUs": (
        {"maxGPUs": 15},
        {"parallelism": GPUS},
        [f"spec.parallelism asks for 16 GPUs (nodes * gpusPerNode), but {WHOSE} at most 15 (limits.maxGPUs)"],
    ),
    "a GPU where none is allowed": (
        {"maxGPUs": 0},
        {"parallelism": {"gpusPerNode": 1}},
        [f"spec.parallelism asks for 1 GPUs (nodes * gpusPerNode), but {WHOSE} at most 0 (limits.maxGPUs)"],
    ),
    "a model from elsewhere": (
        {"modelUriPrefixes": ["hf://Qwen", "hf://a"]},
        {},
        [f"spec.baseModel.uri is s3://models/base, but {WHOSE} only hf://Qwen, hf://a (limits.modelUriPrefixes)"],
    ),
    "a bucket whose name only begins like an allowed one": (
        {"modelUriPrefixes": ["s3://model"]},
        {},
        [f"spec.baseModel.uri is s3://models/base, but {WHOSE} only s3://model (limits.modelUriPrefixes)"],
    ),
    "training records from elsewhere": (
        {"dataUriPrefixes": ["s3://data"]},
        {},
        [f"spec.dataset.train.uri is s3://models/train.jsonl, but {WHOSE} only s3://data (limits.dataUriPrefixes)"],
    ),
    "evaluation records from elsewhere": (
        {"dataUriPrefixes": ["s3://models"]},
        {"dataset": {"train": {"uri": "s3://models/t"}, "eval": {"uri": "hf://org/data"}}},
        [f"spec.dataset.eval.uri is hf://org/data, but {WHOSE} only s3://models (limits.dataUriPrefixes)"],
    ),
    "two things at once": (
        {"maxNodes": 1, "maxGPUs": 8},
        {"parallelism": GPUS},
        [
            f"spec.parallelism.nodes is 2, but {WHOSE} at most 1 (limits.maxNodes)",
            f"spec.parallelism asks for 16 GPUs (nodes * gpusPerNode), but {WHOSE} at most 8 (limits.maxGPUs)",
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_passes_a_limit_is_refused_with_field_value_and_rule(case: str) -> None:
    limits, spec, want = REFUSED[case]
    run, runtime = a_run(**spec), a_runtime("h100", limits=limits)
    assert check_limits(run, runtime) == want
    assert find_refusal(run, runtime) == (FailureClass.RUNTIME_REFUSED, "; ".join(want))


@pytest.mark.parametrize(
    ("runtime", "store", "want"),
    [
        (None, "s3://own", None),
        (a_runtime(store="s3://b"), None, None),
        (None, None, "spec.publish.store is not set, and there is no runtime"),
        (a_runtime("h100"), None, "spec.publish.store is not set, and ClusterLoRARuntime h100 has no store"),
    ],
)
def test_a_run_needs_a_store(runtime: ClusterLoRARuntime | None, store: str | None, want: str | None) -> None:
    found = find_refusal(a_run(publish={"store": store} if store else {}), runtime)
    assert found == (None if want is None else (FailureClass.BAD_SPEC, want))


# -- Snapshot ----------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_the_spec_without_what_is_looked_at_once() -> None:
    looked_at = {"limits": {"maxNodes": 1}, "allowedNamespaces": {"matchLabels": {"team": "a"}}}
    runtime = a_runtime("h100", generation=7, image="trainer:7", gpu=H100, endpoints={"store": "http://s"}, **looked_at)
    snapshot = build_snapshot(runtime)
    assert (snapshot.name, snapshot.generation) == ("h100", 7)
    assert snapshot.spec | looked_at == runtime.spec.to_wire()
    assert not snapshot.spec.keys() & looked_at.keys()
    assert snapshot.spec["endpoints"] == {"store": "http://s"}, "each attempt needs it"


def test_a_snapshot_has_the_limit_that_holds_as_long_as_the_run_lives() -> None:
    limits = {"maxNodes": 1, "maxActiveDeadlineSeconds": 600}
    assert build_snapshot(a_runtime(limits=limits)).spec["limits"] == {"maxActiveDeadlineSeconds": 600}


@pytest.mark.parametrize(("spec", "want"), [({}, "default"), ({"runtimeRef": {"name": "h100"}}, "h100")])
def test_a_run_without_a_reference_takes_the_default_runtime(spec: dict[str, Any], want: str) -> None:
    assert runtime_name(spec) == want
