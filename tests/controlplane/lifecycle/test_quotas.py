"""Namespaces with quotas and limits for containers: a run that fits starts, and one that does not hears why at once."""

from collections.abc import Callable
from typing import Any

import pytest

from lora_operator.settings import Settings
from tests.support.api import Api, ApiError, Raw
from tests.support.operators import OperatorThread
from tests.support.runs import Run, ended, settled
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

ALL = {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"cpu": "2", "memory": "8Gi"}}
HARD = {"requests.cpu": "64", "requests.memory": "512Gi", "limits.cpu": "64", "limits.memory": "512Gi", "pods": "50"}
DISK = {"ephemeral-storage": "2Gi"}
DISK_QUOTA = {"hard": {"requests.ephemeral-storage": "50Gi", "limits.ephemeral-storage": "50Gi"}}
WITH_DISK = {"requests": ALL["requests"] | DISK, "limits": ALL["limits"] | DISK}


def limit(**rule: Any) -> Raw:
    return {"limits": [{"type": "Container", **rule}]}


def put(api: Api, namespace: str, kind: str, spec: Raw) -> None:
    """Makes the ResourceQuota or LimitRange, and waits until the API server keeps to it."""
    core, huge = f"/api/v1/namespaces/{namespace}", {"cpu": "9k", "memory": "9Pi", "ephemeral-storage": "9Pi"}
    api.create(f"{core}/{kind}", {"metadata": {"name": "rule"}, "spec": spec})
    resources = {"requests": huge, "limits": huge} if kind == "resourcequotas" else {"requests": {"memory": "9Pi"}}
    security = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}}
    security |= {"seccompProfile": {"type": "RuntimeDefault"}}
    container = {"name": "any", "image": "any", "resources": resources, "securityContext": security}
    pod = {"metadata": {"name": "probe"}, "spec": {"containers": [container]}}

    def is_kept_to() -> bool:
        try:
            api.create(f"{core}/pods?dryRun=All", pod)
        except ApiError as error:
            return "exceeded quota: rule" in str(error) or "memory" in str(error)
        return False

    eventually("the rule counts", is_kept_to)


FITS: dict[str, tuple[str, Raw, Raw]] = {
    "a quota of limits": ("resourcequotas", {"hard": HARD}, ALL),
    "a quota of disk": ("resourcequotas", DISK_QUOTA, WITH_DISK),
    "little memory by default": ("limitranges", limit(default={"memory": "512Mi", "cpu": "250m"}), ALL),
    "the same, and a run that says nothing": ("limitranges", limit(default={"memory": "512Mi", "cpu": "250m"}), {}),
    "limits by default and a most, and a run that only asks": (
        "limitranges", limit(default={"memory": "4Gi", "cpu": "2"}, max={"memory": "4Gi", "cpu": "2"}),
        {"requests": {"memory": "2Gi"}},
    ),
    "a most that is the run's": ("limitranges", limit(max={"memory": "8Gi", "cpu": "2"}), ALL),
}  # fmt: skip


@pytest.mark.parametrize("case", FITS)
def test_a_run_that_fits_starts(run: Run, api: Api, fast_settings: Callable[..., Settings], case: str) -> None:
    kind, rule, resources = FITS[case]
    put(api, run.namespace, kind, rule)
    secret = {"metadata": {"name": "store"}, "stringData": {"AWS_ACCESS_KEY_ID": "a"}}
    api.create(f"/api/v1/namespaces/{run.namespace}/secrets", secret)
    change = {"podTemplate": {"resources": resources}, "credentials": {"secretRef": {"name": "store"}}}
    with OperatorThread(fast_settings(run.namespace, preflight="on")):
        run.create(lambda spec: spec.update(change))
        run.set_preflight(1, ended(0, settled(), "Completed"))
        run.gang(1)


TOO_LITTLE: dict[str, tuple[Raw, Raw]] = {
    "a ratio": (limit(maxLimitRequestRatio={"memory": "2"}), ALL),
    "a least": (limit(min={"cpu": "1", "memory": "2Gi"}, max={"memory": "16Gi"}), ALL),
}


@pytest.mark.parametrize("case", TOO_LITTLE)
def test_a_preflight_that_asks_for_too_little_asks_for_what_the_gang_does(
    run: Run, api: Api, fast_settings: Callable[..., Settings], case: str
) -> None:
    rule, resources = TOO_LITTLE[case]
    put(api, run.namespace, "limitranges", rule)
    with OperatorThread(fast_settings(run.namespace, preflight="on", start_timeout=600.0)):
        run.create(lambda spec: spec.update(podTemplate={"resources": resources}))
        run.set_preflight(2, ended(0, settled(), "Completed"))
        run.gang(1)
    [failure] = run.status["failures"]
    assert (failure["attempt"], failure["class"], failure["reason"]) == (0, "PodLost", "LimitRange")
    assert not run.status.get("chargedRestarts")


REFUSED: dict[str, tuple[str, Raw, Raw, str, str, str]] = {
    "a quota that is too small": (
        "resourcequotas", {"hard": {"limits.memory": "1Gi"}}, ALL,
        "QuotaExceeded", "exceeded quota: rule, requested: limits.memory=8Gi",
        "To ask for less, change preflightResources",
    ),
    "a ratio that the gang has not either": (
        "limitranges", limit(maxLimitRequestRatio={"memory": "2"}),
        {"requests": {"memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "PodNotStarted", "memory max limit to request ratio per Container is 2",
        "Remedy: Bring preflightResources of the run's ClusterLoRARuntime",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_preflight_that_is_refused_says_so_at_once(
    run: Run, api: Api, fast_settings: Callable[..., Settings], case: str
) -> None:
    kind, rule, resources, reason, words, remedy = REFUSED[case]
    put(api, run.namespace, kind, rule)
    with OperatorThread(fast_settings(run.namespace, preflight="on", start_timeout=600.0)):
        run.create(lambda spec: spec.update(podTemplate={"resources": resources}))
        run.wait("a word", lambda _: run.condition("PreflightPassed").get("reason") == reason)
    message = run.condition("PreflightPassed")["message"]
    assert words in message
    assert remedy in message


def test_a_gang_without_limits_is_told_which_are_missing(
    run: Run, api: Api, fast_settings: Callable[..., Settings]
) -> None:
    put(api, run.namespace, "resourcequotas", {"hard": HARD})
    with OperatorThread(fast_settings(run.namespace, start_timeout=600.0)):
        run.create(lambda spec: spec.update(podTemplate={"resources": {"requests": ALL["requests"]}}))
        run.wait("a word", lambda _: run.condition("Scheduled").get("reason") == "PodNotStarted")
        message = run.condition("Scheduled")["message"]
        assert "must specify limits.cpu for: trainer; limits.memory for: trainer" in message
        assert "Remedy: Set limits.cpu, limits.memory in podTemplate.resources of the run" in message
        path = f"/api/v1/namespaces/{run.namespace}/limitranges"
        api.create(path, {"metadata": {"name": "defaults"}, "spec": limit(default={"cpu": "2", "memory": "8Gi"})})
        run.gang(1)


def test_an_operator_that_is_started_anew_leaves_what_is_told_as_it_is(
    run: Run, api: Api, fast_settings: Callable[..., Settings]
) -> None:
    """It has read no Events yet, and says nothing of the run until it has: two writes for each restart else."""
    put(api, run.namespace, "resourcequotas", {"hard": {"limits.memory": "1Gi"}})
    settings = fast_settings(run.namespace, start_timeout=600.0)
    with OperatorThread(settings):
        run.create(lambda spec: spec.update(podTemplate={"resources": ALL}))
        eventually("the quota is full", lambda: run.status.get("reason") == "QuotaExceeded")
    before = run.raw
    with OperatorThread(settings) as again:
        eventually("its Events are read anew", lambda: sum("/events" in call for call in again.calls) >= 2)
    assert {call.split()[0] for call in again.calls} == {"GET"}
    assert run.raw["status"] == before["status"]
    assert run.raw["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
