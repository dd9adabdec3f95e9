"""Why pods and other children are refused, what to do about it, and for how long it is waited for."""

from datetime import timedelta

import pytest

from lora_api import FailureClass, Phase
from lora_operator.diagnosis.obstacles import diagnose_obstacle, diagnose_refusal
from lora_operator.lifecycle.outcomes import decide_obstructed
from lora_operator.settings import Settings
from lora_operator.state.observed import Observed
from lora_operator.state.reports import Refusal, Reports
from tests.unit.operator.builders import NOW, a_job, a_preflight, a_run

RUN_FIELDS = "podTemplate.resources of the run, or of its ClusterLoRARuntime"
PREFLIGHT_FIELDS = "preflightResources of the run's ClusterLoRARuntime (or podTemplate.resources, which it follows)"


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("failed quota: q: must specify limits.cpu for: trainer; limits.memory for: trainer", "limits.memory in "),
        ("failed quota: q: must specify limits.cpu,limits.memory", "limits.cpu, limits.memory in "),
        ("failed quota: q: must specify memory for: credentials,trainer", "requests.memory in "),
        ("exceeded quota: q, requested: limits.cpu=2, used: limits.cpu=0, limited: limits.cpu=1", "change "),
        ("minimum memory usage per Container is 2Gi, but request is 1Gi", "Bring "),
        ("cpu max limit to request ratio per Container is 4, but provided ratio is 64.000000", "Bring "),
        ('spec.containers[0].resources.requests: Invalid: "1Gi": must be less than or equal to memory limit', "Bring "),
    ],
)
def test_pods_that_a_rule_for_resources_refuses_are_told_the_fields(words: str, field: str) -> None:
    for job, whose in ((a_job(), RUN_FIELDS), (a_preflight(), PREFLIGHT_FIELDS)):
        refusal = Refusal(f'Error creating: pods "{job.name}-0-x" is forbidden: {words}', NOW)
        obstacle = diagnose_obstacle([], job, Reports(refusal=refusal), NOW)
        assert obstacle is not None
        assert words in obstacle.message
        assert field + whose in obstacle.remedy


def test_the_words_of_a_full_quota_are_the_same_whichever_pod_was_tried() -> None:
    """Each change of the status would be a write, for each look at a run that waits."""
    full = "exceeded quota: few, requested: pods=1, used: pods=2, limited: pods=2"
    for pod in ("tickets-1-0-x7k2p", "tickets-1-1-9qbwl"):
        refusal = Refusal(f'Error creating: pods "{pod}" is forbidden: {full}', NOW)
        obstacle = diagnose_obstacle([], a_job(), Reports(refusal=refusal), NOW)
        assert obstacle is not None
        assert obstacle.message == f"Pods of Job tickets-1 are refused: Error creating: {full}"


QUOTA = 'jobs.batch "tickets-1" is forbidden: exceeded quota: few, requested: count/jobs.batch=1, used: 0, limited: 0'
ROLE = 'jobs.batch is forbidden: User "system:serviceaccount:lora-system:lora-operator" cannot create resource "jobs"'
WEBHOOK = 'Internal error occurred: failed calling webhook "jobs.example.com": connection refused'
TOO_LONG = 'Job.batch "run-1" is invalid: spec.template.annotations: Too long: may not be more than 262144 bytes'
DENIED = 'admission webhook "jobs.example.com" denied the request: every Job needs a team'
HIERARCHICAL = (
    'admission webhook "resourcesquotas.hnc.x-k8s.io" denied the request: exceeded hierarchical quota in namespace '
    '"team": "hrq", requested: count/jobs.batch=1, used: count/jobs.batch=8, limited: count/jobs.batch=8'
)
UNKNOWN = 'jobs.batch "tickets-1" is forbidden: status unknown for quota: compute, resources: count/jobs.batch'
NOT_READY = 'jobs.batch "tickets-1" is forbidden: not yet ready to handle request'
GOING = (
    'jobs.batch "tickets-1" is forbidden: unable to create new content in namespace team because it is being terminated'
)


@pytest.mark.parametrize(
    ("kind", "status", "words", "want"),
    [
        ("Job", 403, QUOTA, ("QuotaExceeded", FailureClass.POD_NOT_STARTED, False)),
        ("Job", 403, ROLE, ("OperatorForbidden", FailureClass.POD_NOT_STARTED, False)),
        ("Job", 500, WEBHOOK, ("WebhookFailed", FailureClass.POD_NOT_STARTED, False)),
        ("Job", 500, "etcdserver: request timed out", None),
        ("Job", 400, DENIED, ("PodNotStarted", FailureClass.POD_NOT_STARTED, False)),
        ("Service", 403, DENIED, ("PodNotStarted", FailureClass.POD_NOT_STARTED, False)),
        ("Job", 422, "spec.template: Too long", ("PodNotStarted", FailureClass.POD_NOT_STARTED, False)),
        ("Job", 422, TOO_LONG, ("BadSpec", FailureClass.BAD_SPEC, True)),
        *(
            ("Job", status, HIERARCHICAL, ("QuotaExceeded", FailureClass.POD_NOT_STARTED, False))
            for status in (400, 403, 500)
        ),
        ("Job", 403, UNKNOWN, ("FailedCreate", FailureClass.POD_NOT_STARTED, False)),
        ("Job", 403, NOT_READY, ("FailedCreate", FailureClass.POD_NOT_STARTED, False)),
        ("Job", 413, "Request entity too large", ("BadSpec", FailureClass.BAD_SPEC, True)),
        ("Job", 403, GOING, None),
        ("Job", 404, 'namespaces "team" not found', None),
        ("Job", 503, "unavailable", None),
        ("Job", 0, "no answer", None),
    ],
)
def test_diagnose_refusal(
    kind: str, status: int, words: str, want: tuple[str, FailureClass | None, bool] | None
) -> None:
    obstacle = diagnose_refusal(kind, "tickets-1", status, words, NOW)
    assert (obstacle and (obstacle.reason, obstacle.failure_class, obstacle.permanent)) == want
    if obstacle is not None:
        assert obstacle.text == f"{kind} tickets-1 is refused: {words}. Remedy: {obstacle.remedy}"


@pytest.mark.parametrize(
    ("words", "status", "seconds", "want"),
    [
        (QUOTA, 403, 604_799.0, (Phase.PENDING, "QuotaExceeded", 1.0)),
        (QUOTA, 403, 604_800.0, (Phase.FAILED, "PodNotStarted", None)),
        (ROLE, 403, 86_399.0, (Phase.PENDING, "OperatorForbidden", 1.0)),
        (ROLE, 403, 86_400.0, (Phase.FAILED, "PodNotStarted", None)),
        (WEBHOOK, 500, 86_399.0, (Phase.PENDING, "WebhookFailed", 1.0)),
        (WEBHOOK, 500, 86_400.0, (Phase.FAILED, "PodNotStarted", None)),
        (DENIED, 403, 0.0, (Phase.PENDING, "PodNotStarted", 30.0)),
        (DENIED, 403, 590.0, (Phase.PENDING, "PodNotStarted", 10.0)),
        (DENIED, 403, 600.0, (Phase.FAILED, "PodNotStarted", None)),
        (HIERARCHICAL, 403, 9e4, (Phase.PENDING, "QuotaExceeded", 30.0)),
        (UNKNOWN, 403, 86_399.0, (Phase.PENDING, "FailedCreate", 1.0)),
        (NOT_READY, 403, 86_400.0, (Phase.FAILED, "PodNotStarted", None)),
        ("too large", 413, 0.0, (Phase.FAILED, "BadSpec", None)),
    ],
)
def test_what_is_refused_is_asked_for_again_until_it_has_lasted(
    words: str, status: int, seconds: float, want: tuple[Phase, str, float | None]
) -> None:
    obstacle = diagnose_refusal("Job", "tickets-1", status, words, NOW)
    assert obstacle is not None
    plan = decide_obstructed(Observed(run=a_run()), 1, obstacle, NOW + timedelta(seconds=seconds), Settings())
    assert (plan.phase, plan.reason, plan.requeue_after) == want
    ended = plan.phase is Phase.FAILED
    assert ("starts by itself" in plan.message, "raise runPolicy.retry" in plan.message) == (
        not ended, ended and plan.reason != "BadSpec"
    )  # fmt: skip
