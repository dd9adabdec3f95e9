"""The environment of the pods: who may set what, and who wins."""

from typing import Any

import pytest

from lora_api import LoRAFineTune
from lora_api.environment import SECRET_KEYS
from lora_operator.children.environment import find_left_out
from lora_operator.children.job import build_job, build_preflight_job
from lora_operator.settings import Settings
from lora_operator.state.plan import NOTHING, LaunchAttempt, Plan
from lora_operator.state.runtimes import build_snapshot, fill_in
from lora_operator.status.events import describe_left_out
from tests.unit.operator.builders import a_run, a_runtime

LAUNCH = Plan(actions=(LaunchAttempt(1),))
SECRET = {"credentials": {"secretRef": {"name": "lora-store"}}}


def variables(**values: str) -> dict[str, Any]:
    return {"podTemplate": {"env": [{"name": name, "value": value} for name, value in values.items()]}}


def begun(run: dict[str, Any], runtime: dict[str, Any], **status: Any) -> LoRAFineTune:
    """A run that took a runtime, as it is read afterwards."""
    snapshot = build_snapshot(a_runtime("h100", **runtime)).to_wire()
    return fill_in(a_run(status={"runtime": snapshot, "listedKeys": True, **status}, **run))


def containers(run: LoRAFineTune) -> list[dict[str, Any]]:
    """That of an attempt and that of a preflight."""
    jobs = (build_job(run, 1, Settings()), build_preflight_job(run, 1, Settings()))
    return [job["spec"]["template"]["spec"]["containers"][0] for job in jobs]


def environments(run: LoRAFineTune) -> list[dict[str, Any]]:
    """Variables by name: a value, or where it comes from."""
    found = [
        {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in one["env"]} for one in containers(run)
    ]
    assert [len(one["env"]) for one in containers(run)] == [len(one) for one in found], "each name once"
    return found


# A sentence that says the case: what the run says, what its runtime says, a variable and what it is in the pods.
WINS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str | None]] = {
    "the run's": (variables(NCCL_DEBUG="INFO"), {}, "NCCL_DEBUG", "INFO"),
    "the runtime's": ({}, variables(NCCL_TOPO_FILE="/topo.xml"), "NCCL_TOPO_FILE", "/topo.xml"),
    "the run's over the runtime's": (variables(NCCL_DEBUG="INFO"), variables(NCCL_DEBUG="WARN"), "NCCL_DEBUG", "INFO"),
    "the run's over the libraries'": (variables(TOKENIZERS_PARALLELISM="true"), {}, "TOKENIZERS_PARALLELISM", "true"),
    "not the run's, where only a runtime may": (variables(HF_HOME="/mnt/pvc/x"), {}, "HF_HOME", "/scratch/hf"),
    "the runtime's, where only a runtime may": (
        variables(HF_HOME="/mnt/pvc/x"), variables(HF_HOME="/mnt/pvc/y"), "HF_HOME", "/mnt/pvc/y",
    ),
    "an endpoint over the runtime's own variable": (
        {}, {**variables(HF_ENDPOINT="https://a"), "endpoints": {"hub": "https://b"}}, "HF_ENDPOINT", "https://b",
    ),
    "the runtime's own variable where there is no such endpoint": (
        {}, {**variables(HF_ENDPOINT="https://a"), "endpoints": {"store": "https://b"}}, "HF_ENDPOINT", "https://a",
    ),
    "the store": ({}, {"endpoints": {"store": "http://s3:9000"}}, "AWS_ENDPOINT_URL", "http://s3:9000"),
    "the proxy": ({}, {"endpoints": {"proxy": "http://p:3128"}}, "https_proxy", "http://p:3128"),
    "the proxy in capitals": ({}, {"endpoints": {"proxy": "http://p:3128"}}, "HTTP_PROXY", "http://p:3128"),
    "hosts without the proxy": ({}, {"endpoints": {"noProxy": ".svc,10.0.0.0/8"}}, "no_proxy", ".svc,10.0.0.0/8"),
    "no server but the public ones": (SECRET, {}, "AWS_ENDPOINT_URL", None),
    "a region of the runtime's over the Secret's": (SECRET, variables(AWS_REGION="eu-1"), "AWS_REGION", "eu-1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WINS)
def test_who_wins(case: str) -> None:
    run, runtime, name, want = WINS[case]
    assert [one.get(name) for one in environments(begun(run, runtime))] == [want, want]


def test_what_the_operator_needs_wins_over_everything() -> None:
    run = begun({}, variables(MASTER_ADDR="elsewhere", PET_NNODES="9"))
    found = environments(run)[0]
    assert (found["MASTER_ADDR"], found["PET_NNODES"]) == ("tickets-1-0.tickets-gang.team.svc", "2")


def test_each_listed_key_of_the_secret_is_mapped_and_may_be_missing() -> None:
    for container, environment in zip(containers(a_run(**SECRET)), environments(a_run(**SECRET)), strict=True):
        assert "envFrom" not in container
        found = {name: value["secretKeyRef"] for name, value in environment.items() if "secretKeyRef" in value}
        assert found == {key: {"name": "lora-store", "key": key, "optional": True} for key in SECRET_KEYS}


def test_a_pod_without_its_secret_does_not_start() -> None:
    """The init container takes all of it, which only works where it is there, and names nothing by its name."""
    pod = build_job(a_run(**SECRET), 1, Settings())["spec"]["template"]["spec"]
    [gate] = pod["initContainers"]
    assert gate["envFrom"] == [{"prefix": "UNUSED_", "secretRef": {"name": "lora-store"}}]
    assert "volumeMounts" not in gate
    assert gate["securityContext"] == pod["containers"][0]["securityContext"]
    assert "initContainers" not in build_job(a_run(), 1, Settings())["spec"]["template"]["spec"]


def test_a_device_is_the_trainers_alone() -> None:
    resources = {"requests": {"cpu": "1"}, "limits": {"cpu": "2", "memory": "1Gi", "rdma/hca": "1"}}
    run = a_run(parallelism={"gpusPerNode": 1}, podTemplate={"resources": resources}, **SECRET)
    pod = build_job(run, 1, Settings())["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["resources"] == {"requests": {"cpu": "1"}, "limits": {"cpu": "2", "memory": "1Gi"}}
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_value_is_what_was_written() -> None:
    """Kubernetes reads ``$(NAME)`` as another variable, and ``$$`` as one dollar sign."""
    run = begun(variables(NCCL_DEBUG="$(HF_TOKEN) costs $5"), {})
    assert [one["NCCL_DEBUG"] for one in environments(run)] == ["$$(HF_TOKEN) costs $$5"] * 2


def test_what_is_left_out_is_told_once_a_run() -> None:
    run = a_run(**variables(NCCL_DEBUG="INFO", HF_HOME="/x", HF_ENDPOINT="http://x"))
    assert find_left_out(run) == ["HF_HOME", "HF_ENDPOINT"]
    [event] = describe_left_out(run, LAUNCH)
    assert event.note.startswith("podTemplate.env: HF_HOME, HF_ENDPOINT are left out: ")
    assert "ClusterLoRARuntime" in event.note
    assert event.about == "env", "the same name for every attempt: the API server takes it once"
    assert describe_left_out(run, NOTHING) == []
    assert describe_left_out(a_run(**variables(NCCL_DEBUG="INFO")), LAUNCH) == []
