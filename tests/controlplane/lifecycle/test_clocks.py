"""An operator whose own clock is wrong: it does what one with the right clock does."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from lora_operator.clock import utc_now
from lora_operator.settings import Settings
from tests.controlplane.lifecycle.test_evidence import bind
from tests.support.api import Api
from tests.support.operators import OperatorThread
from tests.support.runs import Run, running
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane


def test_a_pod_that_saves_its_checkpoint_is_not_lost_for_a_clock_that_is_ahead(
    run: Run, api: Api, settings: Settings
) -> None:
    with OperatorThread(settings, clock=lambda: utc_now() + timedelta(seconds=600)) as operator:
        run.create()
        for number, pod in enumerate(run.gang(1)):
            bind(run, pod, f"node-{number}")
            run.set_pod(pod, running())
        run.wait_phase("Running")
        name = run.gang(1)[1]["metadata"]["name"]
        api.delete(f"/api/v1/namespaces/{run.namespace}/pods/{name}")
        cache = operator.operator.cache
        stopping = lambda: any(pod.deleting_at for pod in cache.pods((run.namespace, run.name)))  # noqa: E731
        eventually("the operator knows that the pod stops", stopping)
        run.api.patch(f"{run.path}/{run.name}", {"metadata": {"annotations": {"look": "again"}}})
        written = run.raw["metadata"]["resourceVersion"]
        looked = lambda: int(operator.operator.cache.run((run.namespace, run.name))["metadata"]["resourceVersion"])  # noqa: E731
        eventually("it looks again", lambda: looked() >= int(written))
        assert run.status["phase"] == "Running"
        assert not run.status.get("failures")


@pytest.mark.parametrize("seconds", [-600, 600])
def test_a_quota_is_said_of_whatever_the_clock(
    run: Run, api: Api, fast_settings: Callable[..., Settings], seconds: float
) -> None:
    path = f"/api/v1/namespaces/{run.namespace}/resourcequotas"
    api.create(path, {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}})
    eventually("the quota counts", lambda: api.get(f"{path}/few").get("status", {}).get("hard"))
    with OperatorThread(fast_settings(run.namespace), clock=lambda: utc_now() + timedelta(seconds=seconds)):
        run.create()
        run.wait("the quota's words", lambda status: status.get("reason") == "QuotaExceeded")
