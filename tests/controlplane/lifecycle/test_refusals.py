"""What the API server refuses to create for a run: the status says why, and the run starts once it may, or ends."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import devcluster
from lora_operator.children import document
from lora_operator.kube.rights import RBAC
from lora_operator.settings import Settings
from tests.controlplane.lifecycle.test_interruptions import jobs_created
from tests.support.api import Api, ApiError
from tests.support.operators import OperatorThread
from tests.support.runs import Run
from tests.support.versions import POLICIES, needs
from tests.support.wait import eventually

pytestmark = pytest.mark.controlplane

ADMISSION = "/apis/admissionregistration.k8s.io/v1"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_operator.lifecycle.outcomes._RETRY_SECONDS", 0.5)


def wait_for(run: Run, reason: str, words: str) -> None:
    """Until the run waits for ``reason``, and says so with the API server's ``words`` and a remedy."""
    status = run.wait(reason, lambda status: run.condition("Ready").get("reason") == reason)
    message = run.condition("Ready")["message"]
    assert status["phase"] == "Pending"
    assert words in message
    assert "Remedy: " in message


def check_it_starts(run: Run, cp: devcluster.ControlPlane) -> None:
    run.set_running(1)
    run.wait_phase("Running")
    assert run.status["attempt"] == 1
    assert jobs_created(cp, run.namespace) == ["run-1"]


POD = {"restartPolicy": "Never", "containers": [{"name": "main", "image": "none"}]}
JOB = {"metadata": {"name": "probe"}, "spec": {"template": {"spec": POD}}}
SERVICE = {"metadata": {"name": "probe"}, "spec": {"ports": [{"port": 1}]}}


def allow_none(api: Api, namespace: str, what: str, group: str, plural: str, probe: dict[str, Any]) -> None:
    """Makes the quota "few" of 0, and waits until the API server keeps to it: it may know of it later than we do."""
    quotas = f"/api/v1/namespaces/{namespace}/resourcequotas"
    api.create(quotas, {"metadata": {"name": "few"}, "spec": {"hard": {what: "0"}}})

    def is_kept_to() -> bool:
        try:
            api.create(f"{group}/namespaces/{namespace}/{plural}?dryRun=All", probe)
        except ApiError as error:
            return "exceeded quota: few" in str(error)
        return False

    eventually("the quota counts", is_kept_to, 60)


@pytest.mark.parametrize("preflight", ["off", "on"])
def test_a_quota_of_jobs_is_waited_for(
    run: Run, fast_settings: Callable[..., Settings], api: Api, cp: devcluster.ControlPlane, preflight: str
) -> None:
    allow_none(api, run.namespace, "count/jobs.batch", "/apis/batch/v1", "jobs", JOB)
    with OperatorThread(fast_settings(run.namespace, preflight=preflight)):
        run.create()
        wait_for(run, "QuotaExceeded", "exceeded quota: few")
        assert not run.status.get("attempt")
        quota = f"/api/v1/namespaces/{run.namespace}/resourcequotas/few"
        api.patch(quota, {"spec": {"hard": {"count/jobs.batch": "5"}}})
        if preflight == "off":
            check_it_starts(run, cp)
        else:
            run.wait_phase("Preflight")


@pytest.mark.parametrize("preflight", ["off", "on"])
def test_a_quota_of_jobs_that_stays_full_ends_the_run_which_goes_on_by_retry(
    run: Run, fast_settings: Callable[..., Settings], api: Api, monkeypatch: pytest.MonkeyPatch, preflight: str
) -> None:
    monkeypatch.setattr("lora_operator.diagnosis.obstacles._QUEUES", 2.0)
    allow_none(api, run.namespace, "count/jobs.batch", "/apis/batch/v1", "jobs", JOB)
    with OperatorThread(fast_settings(run.namespace, preflight=preflight)):
        run.create()
        wait_for(run, "QuotaExceeded", "starts by itself")
        [failure] = run.wait_phase("Failed")["failures"]
        assert (failure["class"], failure["reason"]) == ("PodNotStarted", "QuotaExceeded")
        assert failure["remedy"].endswith("raise runPolicy.retry.")
        quota = f"/api/v1/namespaces/{run.namespace}/resourcequotas/few"
        api.patch(quota, {"spec": {"hard": {"count/jobs.batch": "5"}}})
        api.patch(f"{run.path}/{run.name}", {"spec": {"runPolicy": {"retry": 1}}})
        run.wait_phase("Restarting" if preflight == "off" else "Preflight")


def test_a_role_that_is_too_small_is_waited_for(
    run: Run, settings: Settings, api: Api, cp: devcluster.ControlPlane
) -> None:
    rbac, name = "/apis/rbac.authorization.k8s.io/v1", f"narrow-{run.namespace}"
    rules = [{"apiGroups": [rule.group], "resources": rule.resources, "verbs": rule.verbs} for rule in RBAC]
    narrow = [
        {**rule, "verbs": [verb for verb in rule["verbs"] if verb != "create" or "jobs" not in rule["resources"]]}
        for rule in rules
    ]
    api.create(f"{rbac}/clusterroles", {"metadata": {"name": name}, "rules": narrow})
    group = "rbac.authorization.k8s.io"
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": group, "kind": "User", "name": name}],
    }
    api.create(f"{rbac}/clusterrolebindings", binding)
    kubeconfig = str(cp.write_kubeconfig(name, name))
    with OperatorThread(Settings(**{**settings.__dict__, "kubeconfig": kubeconfig})):
        run.create()
        wait_for(run, "OperatorForbidden", 'cannot create resource "jobs"')
        api.patch(f"{rbac}/clusterroles/{name}", {"rules": rules})
        check_it_starts(run, cp)


def test_a_webhook_that_does_not_answer_is_waited_for(
    run: Run, settings: Settings, api: Api, cp: devcluster.ControlPlane
) -> None:
    hooks, name = f"{ADMISSION}/validatingwebhookconfigurations", f"away-{run.namespace}"
    hook = {
        "name": "jobs.example.com",
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": run.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    api.create(hooks, {"metadata": {"name": name}, "webhooks": [hook]})
    try:
        wait_until_refused(api, run.namespace)
        with OperatorThread(settings):
            run.create()
            wait_for(run, "WebhookFailed", "jobs.example.com")
            api.delete(f"{hooks}/{name}")
            check_it_starts(run, cp)
    finally:
        with suppress(ApiError):
            api.delete(f"{hooks}/{name}")


@needs(POLICIES)
def test_a_policy_against_the_job_ends_the_run_in_time(run: Run, settings: Settings, api: Api) -> None:
    name = f"teams-{run.namespace}"
    policy = {
        "failurePolicy": "Fail",
        "matchConstraints": {
            "resourceRules": [
                {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
            ]
        },
        "validations": [
            {"expression": "'team' in object.metadata.?labels.orValue({})", "message": "a Job needs a team"}
        ],
    }
    binding = {
        "policyName": name,
        "validationActions": ["Deny"],
        "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": run.namespace}}},
    }
    api.create(f"{ADMISSION}/validatingadmissionpolicies", {"metadata": {"name": name}, "spec": policy})
    api.create(f"{ADMISSION}/validatingadmissionpolicybindings", {"metadata": {"name": name}, "spec": binding})
    wait_until_refused(api, run.namespace)
    with OperatorThread(settings):
        run.create()
        wait_for(run, "PodNotStarted", "a Job needs a team")
        status = run.wait_phase("Failed")
    (failure,) = status["failures"]
    assert (failure["class"], failure["attempt"]) == ("PodNotStarted", 1)
    assert "a Job needs a team" in failure["message"]


def test_a_quota_of_services_is_waited_for(run: Run, settings: Settings, api: Api, cp: devcluster.ControlPlane) -> None:
    allow_none(api, run.namespace, "count/services", "/api/v1", "services", SERVICE)
    with OperatorThread(settings):
        run.create()
        wait_for(run, "QuotaExceeded", "Service run-gang is refused")
        quota = f"/api/v1/namespaces/{run.namespace}/resourcequotas/few"
        api.patch(quota, {"spec": {"hard": {"count/services": "5"}}})
        check_it_starts(run, cp)


@pytest.mark.parametrize(("preflight", "attempt"), [("off", 1), ("on", 0)])
def test_a_document_that_is_too_large_ends_the_run_at_once(
    run: Run, fast_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, preflight: str, attempt: int
) -> None:
    """A chat template, a system prompt and annotations of the greatest lengths can be more than annotations hold."""
    write = document._write
    monkeypatch.setattr(document, "_write", lambda told: write({**told, "large": "x" * 262_144}))
    with OperatorThread(fast_settings(run.namespace, preflight=preflight)):
        run.create()
        status = run.wait_phase("Failed")
    (failure,) = status["failures"]
    assert (failure["class"], failure["attempt"]) == ("BadSpec", attempt)
    assert f"Job run-{'pre1' if preflight == 'on' else '1'} is refused" in failure["message"]
    assert re.search("spec.template.annotations: Too long: .* 262144", failure["message"])
    assert "Remedy: Shorten what the specification says at length" in run.condition("Stalled")["message"]


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"example.org/nic": "500m"}, "must be an integer"),
        ({"x/y/z": "1"}, "x/y/z"),
        ({"hugepages-2Mi": "3Mi", "memory": "1Gi"}, "hugepages"),
    ],
)
def test_resources_that_no_pod_takes_end_the_run_at_once_by_their_field(
    run: Run, settings: Settings, resources: dict[str, str], words: str
) -> None:
    amounts = {"requests": resources, "limits": resources}
    with OperatorThread(settings):
        run.create(lambda spec: spec.setdefault("podTemplate", {}).update(resources=amounts))
        status = run.wait_phase("Failed")
    (failure,) = status["failures"]
    assert failure["class"] == "BadSpec"
    assert "spec.podTemplate.resources" in failure["message"]
    assert words in failure["message"]
    assert "containers[0]" not in failure["message"]


def wait_until_refused(api: Api, namespace: str) -> None:
    """Policies and webhooks take a moment until the API server knows them."""
    container = {"name": "any", "image": "any"}
    job = {
        "metadata": {"generateName": "probe-"},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs?dryRun=All"

    def refused() -> bool:
        try:
            api.create(path, job)
        except ApiError:
            return True
        return False

    eventually("Jobs are refused", refused)
