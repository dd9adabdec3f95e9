"""Fields of a run that make its Job invalid: they end it at once, by their own names."""

import pytest

from lora_api import FailureClass
from lora_operator.diagnosis.obstacles import diagnose_refusal
from tests.unit.operator.builders import NOW

JOB = 'Job.batch "r0-1" is invalid: '
C = "spec.template.spec.containers[0]"


@pytest.mark.parametrize(
    ("words", "said", "field"),
    [
        (
            f'{C}.resources.requests[example.org/nic]: Invalid value: "500m": must be an integer',
            'spec.podTemplate.resources.requests[example.org/nic]: Invalid value: "500m": must be an integer',
            "spec.podTemplate.resources",
        ),
        (
            f"[{C}.resources.limits[x/y/z]: Invalid value: no name, "
            "spec.template.spec.nodeSelector: Invalid value: bad]",
            "spec.podTemplate.resources.limits[x/y/z]: Invalid value: no name; spec.podTemplate.nodeSelector: "
            "Invalid value: bad",
            "spec.podTemplate.resources, spec.podTemplate.nodeSelector",
        ),
        (
            f"{C.replace('containers', 'initContainers')}.resources: Forbidden: HugePages require cpu or memory",
            "spec.podTemplate.resources: Forbidden: HugePages require cpu or memory",
            "spec.podTemplate.resources",
        ),
        (
            f"[{C}.env[0].valueFrom.secretKeyRef.name: Invalid value: a..b: no name, or '-', {C}.env[1].valueFrom."
            f"secretKeyRef.name: Invalid value: a..b: no name, or '-', {C.replace('containers', 'initContainers')}."
            "envFrom[0].secretRef.name: Invalid value: a..b: no name, or '-']",
            "spec.credentials.secretRef.name: Invalid value: a..b: no name, or '-'",
            "Correct spec.credentials.secretRef.name of",
        ),
        (
            f"{C}.env[3].value: Invalid value: x",
            "spec.podTemplate.env[3].value: Invalid value: x",
            "podTemplate.env of",
        ),
        ("spec.template.labels: Invalid value: x", "spec.podTemplate.labels: Invalid value: x", "podTemplate.labels"),
        (
            "spec.template.metadata.annotations: Invalid value: x",
            "spec.podTemplate.annotations: Invalid value: x",
            "podTemplate.annotations",
        ),
        (
            "spec.template.spec.priorityClassName: Invalid value: x",
            "spec.runPolicy.priorityClassName: Invalid value: x",
            "spec.runPolicy.priorityClassName",
        ),
    ],
)
def test_a_field_of_the_run_that_no_job_takes_ends_it_at_once(words: str, said: str, field: str) -> None:
    obstacle = diagnose_refusal("Job", "r0-1", 422, JOB + words, NOW)
    assert obstacle is not None
    assert (obstacle.failure_class, obstacle.permanent) == (FailureClass.BAD_SPEC, True)
    assert obstacle.message == f"{said} (Job r0-1 is refused)"
    assert obstacle.remedy.startswith("Correct ")
    assert field in obstacle.remedy


@pytest.mark.parametrize(
    "words",
    [
        JOB + "spec.template.spec.volumes[2].name: Duplicate value: a webhook has put it there",
        JOB + "spec.template.spec.containers[1].resources.limits[cpu]: Invalid value: of a sidecar of a webhook",
        JOB + "metadata.labels: Invalid value: 'a b': a valid label must be",
        "jobs.batch \"r0-1\" is forbidden: ValidatingAdmissionPolicy 'p' denied request: containers[0].resources",
    ],
)
def test_what_others_have_put_into_the_job_or_forbid_is_waited_for(words: str) -> None:
    obstacle = diagnose_refusal("Job", "r0-1", 422, words, NOW)
    assert obstacle is not None
    assert not obstacle.permanent
    invalid = words.startswith(JOB)
    assert ("the policy" in obstacle.remedy, "a webhook of the cluster" in obstacle.remedy) == (not invalid, invalid)
