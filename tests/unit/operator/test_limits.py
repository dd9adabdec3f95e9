"""Who may take a runtime, and what a run may ask for: one row for each rule, and the words of each refusal."""

from typing import Any

import pytest

from lora_api import ClusterLoRARuntime, FailureClass
from lora_api.pods import ResourceRequirements
from lora_api.runtime import LabelSelector
from lora_operator.lifecycle.runtime import decide_runtime, find_refusal
from lora_operator.policies.limits import (
    allows_name,
    check_limits,
    count_gpus,
    describe_selector,
    is_gpu,
    parse_quantity,
    selects,
)
from lora_operator.settings import Settings
from lora_operator.state.observed import Observed
from tests.unit.operator.builders import NOW, a_run, a_runtime

WHOSE = "ClusterLoRARuntime h100"

# A sentence that says the case: what the runtime says (None: there is none), what the run says, and why it is refused.
Row = tuple[dict[str, Any] | None, dict[str, Any], list[str]]
MLFLOW = {"mlflow": {"trackingUri": "https://mlflow.example.org/team", "experiment": "x"}}


def wandb(**settings: str) -> dict[str, Any]:
    return {"tracking": {"wandb": {"project": "p", **settings}}}


def stored(store: str, **publish: str) -> dict[str, Any]:
    return {"publish": {"store": store, **publish}}


STORES = {"store": "s3://models/adapters", "limits": {"storePrefixes": ["s3://models", "s3://lab/out/"]}}
BELOW_OTHERS = (
    "spec.publish.store is {store}, but below {root} a run may publish only to {root} itself or below {root}/team, the "
    f"prefix of its own namespace (store and limits.storePrefixes of {WHOSE})"
)

ALL_STORES = "s3://models/adapters/team or s3://models/team or s3://lab/out/team"
FOREIGN_ORIGIN = (
    "spec.checkpoint.resumeFrom.uri is {uri}, but a run of namespace team may go on only from checkpoints below "
    "{where}: copy the checkpoint there, or have PREFIX of PREFIX/team listed in limits.storePrefixes of {whose}"
)


def resumed(uri: str) -> dict[str, Any]:
    return {"checkpoint": {"resumeFrom": {"uri": uri}}}


CASES: dict[str, Row] = {
    # Endpoints
    "a tracker that the runtime lists": (
        {"endpoints": {"tracking": ["https://mlflow.example.org"]}}, {"tracking": MLFLOW}, [],
    ),
    "a tracker that no runtime lists": (
        None,
        {"tracking": MLFLOW},
        [
            "spec.tracking.mlflow.trackingUri is https://mlflow.example.org/team, which is not allowed: add it to "
            "endpoints.tracking of a ClusterLoRARuntime"
        ],
    ),
    "a tracker of another host with the same beginning": (
        {"endpoints": {"tracking": ["https://wandb.example.org"]}},
        wandb(baseUrl="https://wandb.example.org.attacker.test"),
        [
            "spec.tracking.wandb.baseUrl is https://wandb.example.org.attacker.test, which is not allowed: add it to "
            f"endpoints.tracking of {WHOSE}"
        ],
    ),
    "W&B's public service": (None, wandb(), []),
    "W&B's public service by its name": ({}, wandb(baseUrl="https://api.wandb.ai/"), []),
    # Where to publish
    "the runtime's store": (STORES, stored("s3://models/adapters"), []),
    "the runtime's store by not saying any": (STORES, {"publish": {}}, []),
    "below the namespace's own prefix": (STORES, stored("s3://models/adapters/team/tries"), []),
    "the namespace's own prefix": (STORES, stored("s3://lab/out/team/"), []),
    "a listed prefix": (STORES, stored("s3://lab/out"), []),
    "below another namespace's prefix": (
        STORES,
        stored("s3://models/adapters/other"),
        [BELOW_OTHERS.format(store="s3://models/adapters/other", root="s3://models/adapters")],
    ),
    "below another namespace's prefix whose name begins with one's own": (
        STORES,
        stored("s3://lab/out/team-b"),
        [BELOW_OTHERS.format(store="s3://lab/out/team-b", root="s3://lab/out")],
    ),
    "another bucket": (
        STORES,
        stored("s3://elsewhere"),
        [
            f"spec.publish.store is s3://elsewhere, but {WHOSE} allows only s3://models, s3://lab/out, "
            "s3://models/adapters (limits.storePrefixes)"
        ],
    ),
    "a store above the runtime's, so that namespace and name make another's prefix": (
        {"store": "s3://models/team"},
        stored("s3://models", name="other"),
        [BELOW_OTHERS.format(store="s3://models", root="s3://models/team")],
    ),
    "any store where none is listed and it is not below the runtime's": (
        {"store": "s3://models/adapters"},
        stored("s3://elsewhere/other"),
        [],
    ),
    "another namespace's prefix of the runtime's store, with none listed": (
        {"store": "s3://models/adapters"},
        stored("s3://models/adapters/other/x"),
        [BELOW_OTHERS.format(store="s3://models/adapters/other/x", root="s3://models/adapters")],
    ),
    # Whose checkpoint to go on from
    "a checkpoint of a run of the same namespace": (None, resumed("s3://models/adapters/team/old/checkpoints/u/"), []),
    "a checkpoint of a run by its name": (STORES, {"checkpoint": {"resumeFrom": {"name": "old"}}}, []),
    "a checkpoint in the runtime's store by not saying any": (
        STORES,
        {**resumed("s3://models/adapters/team/old/checkpoints/u/step-3"), "publish": {}},
        [],
    ),
    "a checkpoint in a listed prefix": (STORES, resumed("s3://lab/out/team/old/checkpoints/u"), []),
    "a checkpoint of another namespace": (
        None,
        resumed("s3://models/adapters/other/old/checkpoints/u/step-3"),
        [
            FOREIGN_ORIGIN.format(
                uri="s3://models/adapters/other/old/checkpoints/u/step-3",
                where="s3://models/adapters/team",
                whose="a ClusterLoRARuntime",
            )
        ],
    ),
    "a checkpoint of another namespace whose name begins with one's own": (
        STORES,
        resumed("s3://models/adapters/team-b/old/checkpoints/u"),
        [FOREIGN_ORIGIN.format(uri="s3://models/adapters/team-b/old/checkpoints/u", where=ALL_STORES, whose=WHOSE)],
    ),
    "all that another namespace has in a listed prefix": (
        STORES,
        resumed("s3://lab/out"),
        [FOREIGN_ORIGIN.format(uri="s3://lab/out", where=ALL_STORES, whose=WHOSE)],
    ),
    "a checkpoint elsewhere, where anybody may publish anywhere": (
        {"store": "s3://models/adapters"},
        resumed("s3://elsewhere/team/old"),
        [FOREIGN_ORIGIN.format(uri="s3://elsewhere/team/old", where="s3://models/adapters/team", whose=WHOSE)],
    ),
    "a checkpoint of another namespace by a prefix within a prefix": (
        {"store": "s3://models/adapters", "limits": {"storePrefixes": ["s3://models/adapters/team"]}},
        {**resumed("s3://models/adapters/team/other/checkpoints/u"), **stored("s3://models/adapters/team")},
        [
            FOREIGN_ORIGIN.format(
                uri="s3://models/adapters/team/other/checkpoints/u",
                where="s3://models/adapters/team/team or s3://models/adapters/team",
                whose=WHOSE,
            ),
        ],
    ),
    "a checkpoint by a path that climbs in disguise": (
        None,
        resumed("s3://models/adapters/team/%2E%2e/other/old"),
        [
            FOREIGN_ORIGIN.format(
                uri="s3://models/adapters/team/%2E%2e/other/old",
                where="s3://models/adapters/team",
                whose="a ClusterLoRARuntime",
            )
        ],
    ),
    "a checkpoint by a path that climbs": (
        None,
        resumed("s3://models/adapters/team/../other/old"),
        [
            FOREIGN_ORIGIN.format(
                uri="s3://models/adapters/team/../other/old",
                where="s3://models/adapters/team",
                whose="a ClusterLoRARuntime",
            )
        ],
    ),
    # How long, at which priority, in which queue
    "as long as there may be": (
        {"limits": {"maxActiveDeadlineSeconds": 60}},
        {"runPolicy": {"activeDeadlineSeconds": 60}},
        [],
    ),
    "no deadline: it gets the longest": ({"limits": {"maxActiveDeadlineSeconds": 60}}, {}, []),
    "longer than there may be": (
        {"limits": {"maxActiveDeadlineSeconds": 60}},
        {"runPolicy": {"activeDeadlineSeconds": 61}},
        [
            f"spec.runPolicy.activeDeadlineSeconds is 61, but {WHOSE} allows at most 60 "
            "(limits.maxActiveDeadlineSeconds)"
        ],
    ),
    "no queue where one is required": (
        {"limits": {"queueRequired": True}},
        {},
        [f"spec.runPolicy.queueName is not set, but {WHOSE} requires a queue (limits.queueRequired)"],
    ),
    "the runtime's queue where one is required": ({"queueName": "all", "limits": {"queueRequired": True}}, {}, []),
    "its own queue where one is required": (
        {"limits": {"queueRequired": True}},
        {"runPolicy": {"queueName": "own"}},
        [],
    ),
    "a priority where none is listed": (None, {"runPolicy": {"priorityClassName": "batch"}}, []),
    "a priority of the system's": (
        None,
        {"runPolicy": {"priorityClassName": "system-node-critical"}},
        [
            "spec.runPolicy.priorityClassName is system-node-critical, but none that begins with system- is allowed: "
            "limits.priorityClassNames of a ClusterLoRARuntime lists what is"
        ],
    ),
    "a priority that is not listed, of the pods and in the queue": (
        {"limits": {"priorityClassNames": ["low"]}},
        {"runPolicy": {"queueName": "q", "priorityClassName": "high", "workloadPriorityClassName": "urgent"}},
        [
            f"spec.runPolicy.{field} is {name}, but only low is allowed: limits.priorityClassNames of {WHOSE} lists "
            "what is"
            for field, name in (("priorityClassName", "high"), ("workloadPriorityClassName", "urgent"))
        ],
    ),
    "a priority that is listed": (
        {"limits": {"priorityClassNames": ["low", "system-cluster-critical"]}},
        {"runPolicy": {"priorityClassName": "system-cluster-critical"}},
        [],
    ),
    # Annotations and labels
    "an annotation without a runtime": (
        None,
        {"podTemplate": {"annotations": {"iam.amazonaws.com/role": "admin"}}},
        [
            "spec.podTemplate.annotations has iam.amazonaws.com/role, which is not allowed: add it to "
            "limits.annotationNames of a ClusterLoRARuntime"
        ],
    ),
    "a place by Kueue's topology": (
        None,
        {"podTemplate": {"annotations": {"kueue.x-k8s.io/podset-required-topology": "example.com/rack"}}},
        [],
    ),
    "names that are listed": (
        {"limits": {"annotationNames": ["kueue.x-k8s.io/*", "cost"], "labelNames": ["team"]}},
        {"podTemplate": {"annotations": {"kueue.x-k8s.io/a": "1", "cost": "2"}, "labels": {"team": "x"}}},
        [],
    ),
    "names that are not": (
        {"limits": {"annotationNames": ["cost"], "labelNames": []}},
        {"podTemplate": {"annotations": {"cost": "2", "a/cost": "1"}, "labels": {"team": "x"}}},
        [
            "spec.podTemplate.annotations has a/cost, which is not allowed: add it to limits.annotationNames of "
            f"{WHOSE}",
            f"spec.podTemplate.labels has team, which is not allowed: add it to limits.labelNames of {WHOSE}",
        ],
    ),
    "the runtime's own annotations are not the run's": (
        {"podTemplate": {"annotations": {"a": "b"}, "labels": {"c": "d"}}},
        {},
        [],
    ),
    # GPUs by another name
    "slices of GPUs": (
        {"limits": {"maxGPUs": 7}},
        {"podTemplate": {"resources": {"limits": {"nvidia.com/mig-1g.10gb": "4"}}}},
        [
            "spec.parallelism and spec.podTemplate.resources ask for 8 GPUs (nodes * (gpusPerNode + "
            f"nvidia.com/mig-1g.10gb)), but {WHOSE} allows at most 7 (limits.maxGPUs)"
        ],
    ),
    "slices that the runtime asks for": (
        {"podTemplate": {"resources": {"limits": {"nvidia.com/mig-1g.10gb": "1"}}}, "limits": {"maxGPUs": 1}},
        {},
        [
            "spec.parallelism and spec.podTemplate.resources ask for 2 GPUs (nodes * (gpusPerNode + "
            f"nvidia.com/mig-1g.10gb)), but {WHOSE} allows at most 1 (limits.maxGPUs)"
        ],
    ),
    "devices that are no GPUs": (
        {"limits": {"maxGPUs": 0}},
        {"podTemplate": {"resources": {"limits": {"rdma/hca": "8"}}}},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_run_may_ask_for(case: str) -> None:
    said, spec, want = CASES[case]
    runtime = None if said is None else a_runtime("h100", **said)
    run = a_run(**spec)
    assert check_limits(run, runtime) == want
    found = find_refusal(run, runtime)
    assert found == ((FailureClass.RUNTIME_REFUSED, "; ".join(want)) if want else None)


GPUS = {
    "nvidia.com/gpu": True,
    "amd.com/gpu": True,
    "nvidia.com/gpu.shared": True,
    "nvidia.com/mig-1g.10gb": True,
    "nvidia.com/mig-3g.40gb.shared": True,
    "nvidia.com/pgpu": True,
    "volcano.sh/vgpu-number": True,
    "aliyun.com/gpu-mem": True,
    "nvidia.com/gpumem": True,
    "nvidia.com/gpumem-percentage": True,
    "nvidia.com/gpucores": True,
    "gpu.intel.com/i915": True,
    "gpu.intel.com/xe": True,
    "gpu.intel.com/memory.max": False,
    "rdma/hca": False,
    "vpc.amazonaws.com/efa": False,
    "example.org/gpus-licence": False,
    "memory": False,
    "hugepages-2Mi": False,
}


@pytest.mark.parametrize("resource", GPUS)
def test_what_counts_as_a_gpu(resource: str) -> None:
    assert is_gpu(resource) == GPUS[resource]


@pytest.mark.parametrize(
    ("quantity", "want"),
    [
        ("2", 2), ("0", 0), ("1.5", 2), ("1500m", 2), ("4k", 4000), ("1Ki", 1024), ("2Mi", 2097152), ("1e3", 1000),
        ("+.5E3", 500), ("1E", 10**18), ("5.", 5), (".", 0), ("1u", 1), ("3n", 1), ("25e-1", 3),
        ("1e999999999", 10**18),
    ],
)  # fmt: skip
def test_a_quantity_is_counted_in_whole_numbers(quantity: str, want: int) -> None:
    assert parse_quantity(quantity) == want


def test_gpus_are_counted_whichever_side_names_them() -> None:
    resources = ResourceRequirements(requests={"amd.com/gpu": "1"}, limits={"nvidia.com/mig-1g.5gb": "2", "cpu": "8"})
    assert count_gpus(resources) == {"amd.com/gpu": 1, "nvidia.com/mig-1g.5gb": 2}


@pytest.mark.parametrize(
    ("names", "name", "want"),
    [
        (["a/b"], "a/b", True),
        (["a/*"], "a/b", True),
        (["a/*"], "a.b/c", False),
        (["a/*"], "b", False),
        (["*"], "a/b", True),
        (["*"], "b", True),
        (["b"], "a/b", False),
        ([], "b", False),
    ],
)
def test_names_are_whole_or_of_a_domain(names: list[str], name: str, want: bool) -> None:
    assert allows_name(names, name) == want


TIER = {"key": "tier", "operator": "In", "values": ["gold", "silver"]}
SELECTORS: dict[str, tuple[dict[str, Any], dict[str, str], bool, str]] = {
    "nothing is asked": ({}, {}, True, ""),
    "a label": ({"matchLabels": {"team": "a"}}, {"team": "a", "x": "y"}, True, "team=a"),
    "a label of another value": ({"matchLabels": {"team": "a"}}, {"team": "b"}, False, "team=a"),
    "one of several values": ({"matchExpressions": [TIER]}, {"tier": "gold"}, True, "tier in (gold,silver)"),
    "none of several values": ({"matchExpressions": [TIER]}, {"tier": "tin"}, False, "tier in (gold,silver)"),
    "no value": ({"matchExpressions": [TIER]}, {}, False, "tier in (gold,silver)"),
    "not one of them": (
        {"matchExpressions": [{**TIER, "operator": "NotIn"}]}, {"tier": "tin"}, True, "tier notin (gold,silver)",
    ),
    "not one of them, as there is none": (
        {"matchExpressions": [{**TIER, "operator": "NotIn"}]}, {}, True, "tier notin (gold,silver)",
    ),
    "it is there": ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True, "a"),
    "it is not there": ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False, "!a"),
    "both hold": (
        {"matchLabels": {"team": "a"}, "matchExpressions": [TIER]},
        {"team": "a"},
        False,
        "team=a,tier in (gold,silver)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SELECTORS)
def test_a_selector_is_that_of_kubernetes(case: str) -> None:
    raw, labels, want, words = SELECTORS[case]
    selector = LabelSelector.model_validate(raw)
    assert selects(selector, labels) == want
    assert describe_selector(selector) == words


def for_team_a(**spec: Any) -> ClusterLoRARuntime:
    return a_runtime("h100", allowedNamespaces={"matchLabels": {"team": "a"}}, **spec)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"runtimeRef": {"name": "h100"}}, "spec.runtimeRef.name is h100"),
        ({}, "spec.runtimeRef is not set, so it is h100"),
    ],
)
def test_a_runtime_of_other_namespaces_is_refused_and_its_rules_are_not_told(spec: dict[str, Any], field: str) -> None:
    runtime = for_team_a(limits={"maxNodes": 1})
    found = find_refusal(a_run(**spec), runtime, {"team": "b"})
    assert found is not None
    assert found[1] == (
        f"{field}, but {WHOSE} is for namespaces with the labels team=a only (allowedNamespaces), and namespace team "
        "does not have them"
    )
    assert find_refusal(a_run(parallelism={"nodes": 1}), runtime, {"team": "a"}) is None


def test_a_namespace_that_the_operator_may_not_read_is_waited_for() -> None:
    plan = decide_runtime(Observed(run=a_run(), runtime=for_team_a()), NOW, Settings())
    assert plan is not None
    assert (plan.reason, plan.runtime, plan.requeue_after) == ("OperatorForbidden", None, 30.0)
    assert "helm upgrade" in plan.message
