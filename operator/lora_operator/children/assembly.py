"""All that a plan launches, from one run, its settings and its trainer to the manifests, in the order of creation."""

from dataclasses import replace

from lora_api import LoRAFineTune, TrainerPin
from lora_operator.children.configmap import build_configmap, build_preflight_configmap
from lora_operator.children.job import build_gang, build_preflight_job
from lora_operator.children.networkpolicy import build_network_policy
from lora_operator.children.service import build_service
from lora_operator.objects import Raw
from lora_operator.settings import Settings
from lora_operator.state.plan import Plan


def build_children(
    run: LoRAFineTune, plan: Plan, settings: Settings, trainer: TrainerPin, control_key: str | None
) -> list[list[Raw]]:
    """What ``plan`` launches: first, at once, what the Job's pods need and what guards them, and then the Job.

    Or, to restore what somebody deleted, the former alone.
    """
    settings, reads = replace(settings, trainer_image=trainer.image), trainer.run_version
    if plan.restore is not None and plan.restore.preflight:
        return [[build_preflight_configmap(run, plan.restore.preflight)]]
    if plan.restore is not None:
        attempt = plan.restore.attempt
        return [[build_service(run, attempt), build_configmap(run, attempt, reads, control_key)]]
    policy = [build_network_policy(run)] if settings.network_policy == "on" else []
    if plan.launch_preflight is not None:
        number = plan.launch_preflight
        return [[*policy, build_preflight_configmap(run, number)], [build_preflight_job(run, number, settings, reads)]]
    if plan.launch is not None:
        *podgroup, job = build_gang(run, plan.launch, settings, reads)
        configmap = build_configmap(run, plan.launch, reads, control_key)
        return [[*policy, build_service(run, plan.launch), configmap, *podgroup], [job]]
    return []
