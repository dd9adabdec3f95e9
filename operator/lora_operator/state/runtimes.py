"""What a ClusterLoRARuntime means for a run that has taken it: its snapshot, and what it fills in. All pure.

What the run says wins over its runtime, and that over the operator's settings. ``fill_in`` is part of reading a run, so
nothing after that needs to know of runtimes.
"""

from dataclasses import replace

from lora_api import (
    ClusterLoRARuntime,
    ClusterLoRARuntimeSpec,
    LoRAFineTune,
    LoRAFineTuneSpec,
    RuntimeSnapshot,
)
from lora_api.pods import PodTemplate, ResourceRequirements
from lora_api.runtime import taken_runtime
from lora_api.training import Checkpoint
from lora_operator.settings import RunSettings

KEPT_LIMITS = ("maxActiveDeadlineSeconds",)
"""Limits that hold as long as the run lives. The others are looked at once: what they are about cannot change."""


def build_snapshot(runtime: ClusterLoRARuntime) -> RuntimeSnapshot:
    """What of ``runtime`` a run keeps."""
    spec = runtime.spec.to_wire()
    kept = {name: limit for name, limit in spec.pop("limits").items() if name in KEPT_LIMITS}
    spec.pop("allowedNamespaces", None)
    if kept:
        spec["limits"] = kept
    return RuntimeSnapshot(name=runtime.metadata.name, generation=runtime.metadata.generation, spec=spec)


def fill_in(run: LoRAFineTune) -> LoRAFineTune:
    """``run`` with the words of the runtime that it took, wherever it has none of its own.

    Raises:
        pydantic.ValidationError: the snapshot has a value that this operator cannot understand.
    """
    if run.status.runtime is None:
        return run
    runtime = taken_runtime(run)
    spec, policy, publish = run.spec, run.spec.run_policy, run.spec.publish
    ttl = policy.ttl_seconds_after_finished
    changes = {
        "pod_template": _merge_pods(spec, runtime),
        "checkpoint": _merge_checkpoints(spec.checkpoint, runtime.checkpoint),
        "publish": publish.model_copy(update={"store": publish.store or runtime.store}),
        "run_policy": policy.model_copy(
            update={
                "queue_name": policy.queue_name or runtime.queue_name,
                "active_deadline_seconds": _shorter(
                    policy.active_deadline_seconds, runtime.limits.max_active_deadline_seconds
                ),
                "ttl_seconds_after_finished": runtime.ttl_seconds_after_finished if ttl is None else ttl,
            }
        ),
    }
    return run.model_copy(update={"spec": spec.model_copy(update=changes)})


def _shorter(own: int | None, limit: int | None) -> int | None:
    return min((seconds for seconds in (own, limit) if seconds is not None), default=None)


def _merge_pods(spec: LoRAFineTuneSpec, runtime: ClusterLoRARuntimeSpec) -> PodTemplate:
    own, base = spec.pod_template, runtime.pod_template
    secrets = {one.name: one for one in (*base.image_pull_secrets, *own.image_pull_secrets)}
    gpu_nodes = runtime.gpu.node_selector if runtime.gpu and spec.parallelism.gpus_per_node else {}
    return PodTemplate.model_construct(
        resources=merge_resources(own.resources, base.resources),
        node_selector=base.node_selector | gpu_nodes | own.node_selector,
        tolerations=[*base.tolerations, *(one for one in own.tolerations if one not in base.tolerations)],
        env=own.env,  # the runtime's may have other names, and children.environment joins the two
        image_pull_secrets=list(secrets.values()),
        labels=base.labels | own.labels,
        annotations=base.annotations | own.annotations,
    )


def merge_resources(own: ResourceRequirements, base: ResourceRequirements) -> ResourceRequirements:
    """Of a resource that the run names, request and limit are both the run's: halves of two need not fit."""
    named = own.requests.keys() | own.limits.keys()
    return ResourceRequirements.model_construct(
        requests={name: value for name, value in base.requests.items() if name not in named} | own.requests,
        limits={name: value for name, value in base.limits.items() if name not in named} | own.limits,
    )


def _merge_checkpoints(own: Checkpoint, base: Checkpoint) -> Checkpoint:
    when = base if own.every_steps is None and own.every_minutes is None else own
    return Checkpoint(
        every_steps=when.every_steps,
        every_minutes=when.every_minutes,
        keep=base.keep if own.keep is None else own.keep,
    )


def resolve(run: LoRAFineTune, settings: RunSettings) -> RunSettings:
    """What holds for ``run``: ``settings`` as far as the runtime that it took does not say otherwise."""
    own = settings.for_runs()
    if run.status.runtime is None:
        return own
    runtime = taken_runtime(run)
    preflight = own.preflight
    if runtime.preflight is not None:
        preflight = "on" if runtime.preflight else "off"
    return replace(
        own,
        preflight=preflight,
        trainer_image=runtime.image or own.trainer_image,
        trainer_image_pull_policy=runtime.image_pull_policy or own.trainer_image_pull_policy,
        termination_grace=runtime.termination_grace_period_seconds or own.termination_grace,
    )
