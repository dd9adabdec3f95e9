"""All that a launch creates, from one run, its settings and its trainer to the manifests, in the order of creation."""

from dataclasses import replace

from lora_api import LoRAFineTune, TrainerPin
from lora_operator.children.job import build_gang, build_preflight_job
from lora_operator.children.networkpolicy import build_network_policy
from lora_operator.children.service import build_service, needs_service
from lora_operator.objects import Raw
from lora_operator.settings import RunSettings
from lora_operator.state.plan import LaunchAttempt, LaunchPreflight


def build_children(
    run: LoRAFineTune,
    launch: LaunchAttempt | LaunchPreflight,
    settings: RunSettings,
    trainer: TrainerPin,
    control_key: str | None,
) -> list[list[Raw]]:
    """What ``launch`` creates: first, at once, what the Job's pods need and what guards them, and then the Job."""
    settings, reads = replace(settings, trainer_image=trainer.image), trainer.run_version
    policy = [build_network_policy(run)] if settings.network_policy == "on" else []
    if isinstance(launch, LaunchPreflight):
        return [policy, [build_preflight_job(run, launch.number, settings, reads)]]
    service = [build_service(run)] if needs_service(run) else []
    *podgroup, job = build_gang(run, launch.number, settings, reads, control_key)
    return [[*policy, *service, *podgroup], [job]]
