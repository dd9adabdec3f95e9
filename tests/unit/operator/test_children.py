"""The children as files: ``UPDATE_GOLDEN=1 pytest tests/unit/operator`` writes them anew."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_api import RUN_VERSION, LoRAFineTune, TrainerPin
from lora_api.pods import PodTemplate
from lora_operator.children.assembly import build_children
from lora_operator.children.document import build_document
from lora_operator.children.job import build_gang, build_job, build_preflight_job, omp_threads
from lora_operator.children.podgroup import multiply_quantity
from lora_operator.children.service import build_service
from lora_operator.names import RUN_ANNOTATION
from lora_operator.settings import Settings
from lora_operator.state.plan import LaunchAttempt
from tests.unit.operator.builders import a_run

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = Settings(trainer_image="registry.example/lora-trainer:1.2.3")

RUNS: dict[str, tuple[LoRAFineTune, int]] = {
    "cpu": (
        a_run(
            credentials={"secretRef": {"name": "lora-store"}},
            podTemplate={"resources": {"requests": {"cpu": "500m", "memory": "3Gi"}, "limits": {"memory": "6Gi"}}},
        ),
        1,
    ),
    "gpu": (
        a_run(
            baseModel={"uri": "hf://meta-llama/Llama-3.1-8B-Instruct", "revision": "main"},
            dataset={
                "train": {"uri": "pvc://datasets/support/train.jsonl"},
                "eval": {"uri": "pvc://datasets/support/eval.jsonl"},
            },
            training={"epochs": 2, "globalBatchSize": 64, "microBatchSize": 2},
            parallelism={"nodes": 4, "gpusPerNode": 8},
            podTemplate={
                "resources": {"requests": {"cpu": "32", "memory": "256Gi"}, "limits": {"memory": "256Gi"}},
                "nodeSelector": {"gpu": "h100"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "env": [{"name": "NCCL_SOCKET_IFNAME", "value": "eth0"}, {"name": "HF_HOME", "value": "/tmp/hf"}],
                "imagePullSecrets": [{"name": "registry"}],
                "labels": {"team": "support"},
                "annotations": {"example.com/cost": "42"},
            },
        ),
        3,
    ),
}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and nothing as a reference, so that a difference can be read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def build_all(run: LoRAFineTune, attempt: int) -> list[dict[str, Any]]:
    return [build_service(run), build_job(run, attempt, SETTINGS, RUN_VERSION)]


QUEUED = a_run(
    training={"epochs": 2, "globalBatchSize": 64, "microBatchSize": 2},
    parallelism={"nodes": 4, "gpusPerNode": 8},
    runPolicy={"queueName": "team-a", "priorityClassName": "batch-low", "workloadPriorityClassName": "research"},
    podTemplate={
        "resources": {"requests": {"cpu": "500m", "memory": "1.5Gi"}, "limits": {"memory": "2Gi"}},
        "labels": {"team": "support"},
        "annotations": {"kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/topology-rack"},
    },
)


@pytest.mark.parametrize("name", RUNS)
def test_the_children_are_as_their_file_says(name: str) -> None:
    check_golden(name, build_all(*RUNS[name]))


def test_the_children_of_a_preflight_are_as_their_file_says() -> None:
    check_golden("preflight", [build_preflight_job(RUNS["gpu"][0], 2, SETTINGS)])


def test_a_job_that_names_a_queue_waits_for_it_and_its_preflight_does_not() -> None:
    check_golden("queued", build_gang(QUEUED, 1, SETTINGS))
    preflight = build_preflight_job(QUEUED, 1, SETTINGS)
    assert "suspend" not in preflight["spec"]
    assert "priorityClassName" not in preflight["spec"]["template"]["spec"]
    assert not [label for label in preflight["metadata"]["labels"] if "kueue" in label]


@pytest.mark.parametrize("scheduler", ["volcano", "coscheduling"])
def test_a_gang_scheduler_is_told_of_the_gang_before_its_job_is_made(scheduler: Any) -> None:
    children = build_gang(QUEUED, 2, replace(SETTINGS, gang_scheduler=scheduler))
    assert [child["kind"] for child in children] == ["PodGroup", "Job"]
    check_golden(scheduler, children)


def test_a_gang_scheduler_may_have_a_name_of_its_own() -> None:
    settings = replace(SETTINGS, gang_scheduler="coscheduling", scheduler_name="default-scheduler")
    job = build_job(RUNS["cpu"][0], 1, settings)
    assert job["spec"]["template"]["spec"]["schedulerName"] == "default-scheduler"
    assert "suspend" not in job["spec"]


@pytest.mark.parametrize(
    ("quantity", "factor", "want"),
    [
        ("500m", 2, "1000m"),
        ("1.5Gi", 3, "4.5Gi"),
        ("8", 4, "32"),
        ("100", 100, "10000"),
        ("0", 5, "0"),
        ("+4", 2, "8"),
        ("+4Gi", 2, "8Gi"),
        (".", 2, "0"),
        ("2e3", 3, "6e3"),
        ("1E", 2, "2E"),
    ],
)
def test_multiply_quantity(quantity: str, factor: int, want: str) -> None:
    assert multiply_quantity(quantity, factor) == want


def check_golden(name: str, children: list[dict[str, Any]]) -> None:
    text = yaml.dump_all(children, Dumper=_Dumper, sort_keys=False, width=120)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", RUNS)
def test_builders_are_pure(name: str) -> None:
    run, attempt = RUNS[name]
    before = run.model_dump()
    assert build_all(run, attempt) == build_all(run, attempt)
    assert run.model_dump() == before


def test_a_user_cannot_take_over_the_operators_labels() -> None:
    run = a_run(podTemplate={"labels": {"lorafinetune.io/name": "other", "app.kubernetes.io/managed-by": "other"}})
    labels = build_job(run, 1, SETTINGS)["spec"]["template"]["metadata"]["labels"]
    assert labels["lorafinetune.io/name"] == "tickets"
    assert labels["app.kubernetes.io/managed-by"] == "lora-operator"


def test_a_runtime_cannot_take_the_place_of_the_run_document() -> None:
    run = a_run(podTemplate={"annotations": {RUN_ANNOTATION: "{}", "example.com/cost": "42"}})
    annotations = build_job(run, 1, SETTINGS)["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {RUN_ANNOTATION: build_document(run, 1, 1), "example.com/cost": "42"}


def test_a_run_of_one_node_has_no_service_and_finds_itself() -> None:
    run = a_run(parallelism={"nodes": 1, "gpusPerNode": 8}, training={"maxSteps": 1, "globalBatchSize": 8})
    (policy,), (job,) = build_children(run, LaunchAttempt(1), SETTINGS, TrainerPin(image="a", run_version=1), None)
    pod = job["spec"]["template"]["spec"]
    environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert policy["kind"] == "NetworkPolicy"
    assert (environment["MASTER_ADDR"], environment["PET_MASTER_ADDR"]) == ("localhost", "localhost")
    assert "subdomain" not in pod


def test_names_fit_where_kubernetes_is_strictest() -> None:
    run = a_run(metadata={"name": "n" * 52})
    service, job = build_all(run, 121)
    assert len(service["metadata"]["name"]) <= 63
    assert len(f"{job['metadata']['name']}-63") <= 63, "the host name of a pod"
    assert len(f"{build_preflight_job(run, 121, SETTINGS)['metadata']['name']}-0") <= 63


@pytest.mark.parametrize(
    ("resources", "processes", "on_cpu", "want"),
    [
        ({}, 1, True, 1),
        ({}, 8, False, None),
        ({"requests": {"cpu": "500m"}}, 1, True, 1),
        ({"requests": {"cpu": "32"}}, 8, False, 4),
        ({"requests": {"cpu": "2"}, "limits": {"cpu": "7500m"}}, 1, True, 7),
        ({"limits": {"cpu": "7500000u"}}, 1, True, 7),
        ({"limits": {"cpu": "7500000000n"}}, 1, True, 7),
        ({"limits": {"cpu": "1Ki"}}, 8, False, 128),
        ({"limits": {"cpu": "+1.6e1"}}, 8, False, 2),
        ({"limits": {"cpu": "."}}, 8, False, 1),
    ],
)
def test_omp_threads(resources: dict[str, Any], processes: int, on_cpu: bool, want: int | None) -> None:
    template = PodTemplate.model_validate({"resources": resources})
    assert omp_threads(template, processes, on_cpu=on_cpu) == want
