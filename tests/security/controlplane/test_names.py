"""Names that are built to collide: no child of a run is taken for, or reached as, one of another run."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.children.job import build_job, build_preflight_job
from lora_operator.children.service import build_service
from lora_operator.names import child_name, preflight_name, service_name
from lora_operator.objects import Raw
from lora_operator.settings import Settings
from tests.support.api import Api
from tests.support.operators import OperatorThread
from tests.support.runs import Run
from tests.unit.operator.builders import a_job, a_run

controlplane = pytest.mark.controlplane

MAX_NAME = 52
MAX_LABEL = 63

BASE = st.sampled_from(["a", "a-1", "a-1-1", "a-pre1", "a-pre1-1", "pre1", "1", "a-1-pre1", "a--1", "1-1", "a-11"])
NAME = BASE | st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}(-[0-9]|-pre[0-9]|[a-z0-9]))?", fullmatch=True)
NUMBER = st.integers(1, 12) | st.integers(1, 9999)
CHILD = st.tuples(NAME, st.sampled_from(["attempt", "preflight"]), NUMBER)
Child = tuple[str, str, int]


def name_of(child: Child) -> str:
    run, kind, number = child
    return child_name(run, number) if kind == "attempt" else preflight_name(run, number)


def hosts_of(child: Child, nodes: int = 3) -> set[str]:
    """Full names of the pods in their namespace, as the Job controller and the Service make them."""
    name = name_of(child)
    return {f"{name}-{index}.{service_name(child[0])}" for index in range(nodes)}


@given(CHILD, CHILD)
def test_no_two_children_of_one_namespace_have_a_name_in_common(one: Child, other: Child) -> None:
    """Attack: who may create runs calls one so that its children have the names of another run's."""
    if one != other:
        assert name_of(one) != name_of(other)
        assert not hosts_of(one) & hosts_of(other)


@given(CHILD, NAME)
def test_no_service_selects_the_pods_of_another_run(one: Child, run: str) -> None:
    """Attack: who may create runs calls one so that its pods answer under the address of another run's rank 0."""
    spec = a_run(metadata={"name": one[0], "uid": f"uid of {one[0]}"})
    job = build_job(spec, one[2], Settings()) if one[1] == "attempt" else build_preflight_job(spec, one[2], Settings())
    labels = job["spec"]["template"]["metadata"]["labels"]
    service = build_service(a_run(metadata={"name": run, "uid": f"uid of {run}"}))
    selects = service["spec"]["selector"].items() <= labels.items()
    assert selects == (one[0] == run)
    subdomain = job["spec"]["template"]["spec"].get("subdomain")
    assert (subdomain == service["metadata"]["name"]) == (one[:2] == (run, "attempt"))


@given(st.text("ab1-", min_size=50, max_size=50), st.integers(1, 9999), st.integers(0, 127))
def test_the_longest_names_fit_and_stay_apart(middle: str, number: int, index: int) -> None:
    """Attack: who may create runs gives one the longest name, for something to cut it down to another's."""
    name = f"a{middle}b"
    assert len(name) == MAX_NAME
    for child, pod in ((child_name(name, number), index), (preflight_name(name, number), 0)):
        assert child.startswith(name)
        assert len(f"{child}-{pod}") <= MAX_LABEL


@given(NAME, NUMBER, st.sampled_from(["a", "a-1", "default"]))
def test_rank_zero_is_looked_for_in_its_own_namespace(name: str, attempt: int, namespace: str) -> None:
    """Attack: who owns the namespace a-1 makes a Service a-1-0 in it, which the resolver comes to while rank 0 of the
    run a has no address yet: a-1-0.a-1 with the search domain svc.cluster.local.
    """
    job = build_job(a_run(metadata={"name": name, "namespace": namespace}), attempt, Settings())
    [container] = job["spec"]["template"]["spec"]["containers"]
    found = {variable["name"]: variable.get("value") for variable in container["env"]}
    child = child_name(name, attempt)
    for variable in ("MASTER_ADDR", "PET_MASTER_ADDR"):
        address = str(found[variable])
        assert address == f"{child}-0.{service_name(name)}.{namespace}.svc"
        searched = [f"{address}.{domain}" for domain in (f"{namespace}.svc.cluster.local", "svc.cluster.local")]
        for other in searched:  # NAME.NAMESPACE.svc.cluster.local, or HOST.NAME.NAMESPACE.svc.cluster.local
            assert len(other.removesuffix(".svc.cluster.local").split(".")) > 3, "the address of nobody"


@pytest.mark.parametrize(
    ("changes", "own"),
    [({}, True), ({"name": "evil"}, False), ({"attempt": 99}, False), ({"preflight": 1}, False), ({"run": "a"}, False)],
    ids=["the operator's", "another name", "another attempt", "a preflight", "another run"],
)
def test_a_job_is_what_its_name_says(changes: dict[str, Any], own: bool) -> None:
    """Attack: who may create Jobs gives one the labels of an attempt that is to come."""
    assert replace(a_job(1), **changes).has_own_name is own


# -- on a real API server


def a_foreign_job(run: Run, name: str, labels: dict[str, str]) -> Raw:
    metadata = run.raw["metadata"]
    owner = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "LoRAFineTune", "name": run.name, "uid": metadata["uid"]}
    pod = {"restartPolicy": "Never", "containers": [{"name": "any", "image": "any"}]}
    return {
        "metadata": {"name": name, "labels": labels, "ownerReferences": [{**owner, "controller": True}]},
        "spec": {"suspend": True, "template": {"spec": pod}},
    }


@controlplane
def test_a_job_in_the_name_of_a_run_is_no_attempt_of_it(api: Api, run: Run, settings: Settings) -> None:
    """Attack: who may create Jobs makes one with the name of the first attempt that names the run as its owner."""
    run.create()
    path = f"/apis/batch/v1/namespaces/{run.namespace}/jobs"
    before = api.create(path, a_foreign_job(run, "run-1", {}))
    with OperatorThread(settings):
        status = run.wait_phase("Failed")
    [failure] = status["failures"]
    assert failure["class"] == "NameConflict"
    assert "Job run-1 exists already and was not made by the operator" in failure["message"]
    after = api.get(f"{path}/run-1")
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])


@controlplane
def test_a_job_with_labels_of_a_later_attempt_is_not_followed(api: Api, run: Run, settings: Settings) -> None:
    """Attack: who may create Jobs makes one with another name, whose labels say that it is attempt 7."""
    run.create()
    labels = {"lorafinetune.io/name": run.name, "lorafinetune.io/attempt": "7"}
    api.create(f"/apis/batch/v1/namespaces/{run.namespace}/jobs", a_foreign_job(run, "evil", labels))
    with OperatorThread(settings):
        run.set_running(1)
        assert run.wait_phase("Running")["attempt"] == 1


@controlplane
def test_runs_whose_names_begin_alike_do_not_meet(api: Api, namespace: str, settings: Settings) -> None:
    """Attack: who may create runs calls them a, a-1, a-1-1 and a-pre1, in one namespace."""
    names = ["a", "a-1", "a-1-1", "a-pre1"]
    runs = [Run(api, namespace, name) for name in names]
    with OperatorThread(settings):
        for one in runs:
            one.create()
        for one in runs:
            one.set_running(1)
        for one in runs:
            one.wait_phase("Running")
        runs[0].set_failed(1, "Internal", 70)
        runs[0].gang(2)
        for one in runs[1:]:
            assert one.status["attempt"] == 1
            assert one.status["phase"] == "Running"
            [job] = one.jobs()
            assert job["metadata"]["name"] == f"{one.name}-1"
