"""Pods that are refused: who mends it, what to do, and for how long the run waits."""

import pytest

from lora_api import ConditionType, FailureClass, Phase
from lora_operator.lifecycle.decide import decide
from lora_operator.state.reports import Refusal, Reports, hear_refusal
from tests.unit.operator.builders import NOW, a_run, ago, seen, stamp
from tests.unit.operator.cases import JOB, SETTINGS, STARTED

AWAY = (
    'Internal error occurred: failed calling webhook "pods.example.com": failed to call webhook: Post '
    '"https://hooks.example.com/": dial tcp: connection refused'
)
DENIED = 'admission webhook "pods.example.com" denied the request: no team'
CLASS = 'pods "tickets-1-0-x7k2p" is forbidden: no PriorityClass with name high was found'
FULL = 'pods "tickets-1-0-x7k2p" is forbidden: exceeded quota: few, requested: pods=1, used: pods=2, limited: pods=2'
HIERARCHICAL = (
    'Error creating: admission webhook "resourcesquotas.hnc.x-k8s.io" denied the request: exceeded hierarchical quota '
    'in namespace "team": "hrq", requested: pods=1, used: pods=8, limited: pods=8'
)
DAY = 86_400.0
REFUSED: dict[str, tuple[str, str, str, float | None]] = {
    "a webhook that is away": (AWAY, "WebhookFailed", "See why the webhook", DAY),
    "a webhook that says no": (DENIED, "PodNotStarted", "Correct what the message names", SETTINGS.start_timeout),
    "a priority class that is missing": (CLASS, "PriorityClassNotFound", "Create the PriorityClass", DAY),
    "a LimitRange that wants more": (
        'pods "x" is forbidden: minimum cpu usage per Container is 1, but request is 500m',
        "PodNotStarted",
        "Bring podTemplate.resources",
        SETTINGS.start_timeout,
    ),
    "Pod Security": (
        'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    "a policy written in CEL": (
        "pods \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no team",
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    "a pod that cannot be": (
        'Error creating: Pod "x" is invalid: spec.containers[0].name: Required value',
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    **{
        words: (words, "FailedCreate", "This may pass by itself", DAY)
        for words in (
            "Error creating: Internal error occurred: resource quota evaluation timed out",
            "Error creating: etcdserver: request timed out",
            'Error creating: pods "x" is forbidden: status unknown for quota: q, resources: pods',
            'Error creating: pods "x" is forbidden: error looking up service account team/default: serviceaccount '
            '"default" not found',
            "Error creating: Unauthorized",
            'pods "x" is forbidden: failed to complete mutation in 13s',
        )
    },
    "an image that a policy denies": (
        'Error creating: pods "x" is forbidden: image policy webhook backend denied one or more images: not signed',
        "PodNotStarted",
        "Correct what the message names",
        SETTINGS.start_timeout,
    ),
    "a hierarchical quota that is full": (HIERARCHICAL, "QuotaExceeded", "Wait until the quota has room", None),
    "a quota that is full": (FULL, "QuotaExceeded", "Wait until the quota has room", None),
}

FINAL = {"FailedCreate": "See what the message names"}
"""What the remedy begins with once the run has failed, where that is not what it began with before."""


@pytest.mark.parametrize("name", REFUSED)
def test_pods_that_are_refused(name: str) -> None:
    words, reason, remedy, limit = REFUSED[name]
    lasts = min(limit or 9 * DAY, 9 * DAY)
    for since, ends in ((lasts - 1, False), (lasts, limit is not None)):
        reports = Reports(refusal=Refusal(words, ago(since)))
        plan = decide(seen(a_run(status=STARTED), JOB, reports=reports), NOW, SETTINGS)
        mark = plan.conditions[ConditionType.RUNNING]
        assert mark.reason == ("PodNotStarted" if ends else reason)
        assert f"Remedy: {FINAL.get(reason, remedy) if ends else remedy}" in mark.message
        assert ("by itself" in mark.message, "raise runPolicy.retry" in mark.message) == (not ends, ends)
        assert (plan.failure and plan.failure.failure_class) == (FailureClass.POD_NOT_STARTED if ends else None)
        if not ends and limit is not None:
            assert plan.requeue_after == 1.0


def test_the_time_goes_on_while_one_and_the_same_refuses() -> None:
    first = hear_refusal(Reports(), AWAY, ago(60))
    assert first.refusal is not None
    again = hear_refusal(first, AWAY.replace("refused", "reset"), NOW).refusal
    other = hear_refusal(first, CLASS, NOW).refusal
    assert again is not None
    assert other is not None
    assert (again.since, other.since) == (ago(60), NOW)


def test_what_refuses_the_pods_of_a_run_that_has_worked_is_waited_for_a_day() -> None:
    """The attempt ends after the usual time, and the next one asks again."""
    status = {**STARTED, "lastCheckpoint": {"step": 5, "at": stamp(ago(9000))}}
    reports = Reports(refusal=Refusal(DENIED, ago(SETTINGS.start_timeout)))
    plan = decide(seen(a_run(status=status), JOB, reports=reports), NOW, SETTINGS)
    assert plan.failed is not None
    assert plan.failed.budget is not None
    assert (plan.phase, plan.failed.charged, plan.failed.budget.since) == (Phase.RESTARTING, False, ago(600))
    assert "It is tried again by itself" in plan.message
    over = a_run(status={**status, "failingSince": stamp(ago(DAY))})
    plan = decide(seen(over, JOB, reports=reports), NOW, SETTINGS)
    assert (plan.phase, plan.reason) == (Phase.FAILED, "PodNotStarted")
    assert "raise runPolicy.retry" in plan.message
