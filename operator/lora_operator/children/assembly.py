"""All that a plan launches, from one run, its settings and its trainer to the manifests, in the order of creation."""

from dataclasses import replace

from lora_api import LoRAFineTune, TrainerPin
from lora_operator.children.job import build_gang, build_preflight_job
from lora_operator.children.networkpolicy import build_network_policy
from lora_operator.children.service import build_service, needs_service
from lora_operator.objects import Raw
from lora_operator.settings import Settings
from lora_operator.state.plan import Plan


def build_children(
    run: LoRAFineTune, plan: Plan, settings: Settings, trainer: TrainerPin, control_key: str | None
) -> list[list[Raw]]:
    """What ``plan`` launches: first, at once, what the Job's pods need and what guards them, and then the Job."""
    settings, reads = replace(settings, trainer_image=trainer.image), trainer.run_version
    policy = [build_network_policy(run)] if settings.network_policy == "on" else []
    if plan.launch_preflight is not None:
        return [policy, [build_preflight_job(run, plan.launch_preflight, settings, reads)]]
    if plan.launch is not None:
        service = [build_service(run)] if needs_service(run) else []
        *podgroup, job = build_gang(run, plan.launch, settings, reads, control_key)
        return [[*policy, *service, *podgroup], [job]]
    return []
