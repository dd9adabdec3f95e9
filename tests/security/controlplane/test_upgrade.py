"""A run that was stored before the CRD refused what it asks for."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

import devcluster
from lora_api.crd import RUN
from lora_operator.settings import Settings
from tests.support.api import ApiError
from tests.support.install import CRDS
from tests.support.operators import OperatorThread
from tests.support.runs import Run
from tests.support.versions import RATCHETING, knows
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

ITEMS = ("spec", "versions", 0, "schema", "openAPIV3Schema", "properties", "spec", "properties", "podTemplate",
         "properties", "env", "items")  # fmt: skip
PLANTED = {"HF_HOME": "/mnt/pvc/planted", "NCCL_NET_PLUGIN": "/mnt/pvc/planted/evil.so", "HF_ENDPOINT": "http://evil"}


@pytest.fixture
def upgrade(cp: devcluster.ControlPlane) -> Iterator[Callable[[], None]]:
    """Takes the rules of podTemplate.env out of the CRD; returns what brings them back, as the end of the test does."""

    def bring_back() -> None:
        cp.kubectl("apply", f"--filename={CRDS}")

    crd = yaml.safe_load((CRDS / f"{RUN.name}.yaml").read_text())
    items: Any = crd
    for part in ITEMS:
        items = items[part]
    assert items.pop("x-kubernetes-validations")
    cp.kubectl("apply", "--filename=-", input=json.dumps(crd))
    yield bring_back
    bring_back()


def suspended_and_planted(spec: dict[str, Any]) -> None:
    env = [{"name": name, "value": value} for name, value in {**PLANTED, "NCCL_DEBUG": "WARN"}.items()]
    spec.update(podTemplate={"env": env}, runPolicy={"suspend": True})


def test_a_variable_that_was_stored_before_it_was_refused(
    run: Run, settings: Settings, upgrade: Callable[[], None]
) -> None:
    """Attack: a user has created a suspended run with harmful variables, and lets it go after the upgrade.

    Its pods do not get them, in no attempt, which is told once; and its status and its knobs can still be written:
    the API server does not judge again what a write leaves as it was (from Kubernetes 1.30 on; before, that is said).
    """

    def takes(other: Run) -> bool:
        """Whether the API server takes such a run now: a CRD is served some time after it was written."""
        try:
            other.create(suspended_and_planted)
        except ApiError as error:
            if "of a ClusterLoRARuntime" in str(error):
                return False
            raise
        return True

    eventually("the older CRD is served", lambda: takes(run))
    upgrade()
    tries = (Run(run.api, run.namespace, f"try-{number}") for number in itertools.count())
    eventually("today's CRD is served", lambda: not takes(next(tries)))
    with OperatorThread(settings):
        if not knows(RATCHETING):
            [told] = eventually("it is said", lambda: [one for one in run.events() if one["reason"] == "StatusRefused"])
            assert "Remedy: delete this LoRAFineTune" in told["note"]
            assert "spec.podTemplate.env[0].name" in told["note"]
            assert (run.status, run.jobs()) == ({}, [])
            with pytest.raises(ApiError, match="of a ClusterLoRARuntime"):
                run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": False}}})
            return
        run.wait_phase("Suspended")
        run.api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"suspend": False}}})
        for attempt in (1, 2):
            for pod in run.gang(attempt):
                [container] = pod["spec"]["containers"]
                found = {entry["name"]: entry.get("value") for entry in container["env"]}
                assert found["HF_HOME"] == "/scratch/hf"
                assert not {"NCCL_NET_PLUGIN", "HF_ENDPOINT"} & found.keys()
                assert found["NCCL_DEBUG"] == "WARN"
            run.set_failed(attempt, "StoreUnavailable", 74)
        run.set_running(3)
        run.wait_phase("Running")
        told = [event for event in run.events() if event["reason"] == "EnvironmentLeftOut"]
        assert len(told) == 1
        assert told[0]["note"].startswith("podTemplate.env: HF_HOME, NCCL_NET_PLUGIN, HF_ENDPOINT are left out")
