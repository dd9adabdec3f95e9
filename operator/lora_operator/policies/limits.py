"""What a run may ask for under its runtime, or without one: each rule a function that says what it refuses. All pure.

A run without a runtime gets what harms nobody: no server but the public ones, no annotation and no label.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from lora_api import ClusterLoRARuntime, LoRAFineTune
from lora_api.endpoints import allows_tracker, is_below
from lora_api.pods import ResourceRequirements
from lora_api.runtime import LabelRequirement, LabelSelector, Limits
from lora_operator.state.quantities import parse_exactly
from lora_operator.state.runtimes import merge_resources

_GPU_PART = re.compile(r"[vp]?gpu(mem|cores)?([._-].*)?|mig-.+")
"""Of gpumem and gpucores alone HAMi makes a whole GPU: its webhook adds the nvidia.com/gpu that is missing."""
_INTEL_GPUS = ("i915", "xe")
_SYSTEM = "system-"
_TOPOLOGY = tuple(f"kueue.x-k8s.io/podset-{kind}-topology" for kind in ("required", "preferred", "unconstrained"))
"""Annotations by which Kueue places pods close together. They give a run nothing but a place, so every run has them."""


def check_limits(run: LoRAFineTune, runtime: ClusterLoRARuntime | None) -> list[str]:
    """What ``run`` asks for and may not have, a sentence each, with the field, the rule and what would allow it."""
    whose = _describe(runtime)
    limits = runtime.spec.limits if runtime is not None else Limits()
    return [
        *_check_size(run, runtime, limits, whose),
        *_check_sources(run, limits, whose),
        *_check_store(run, runtime, whose),
        *_check_origin(run, runtime, whose),
        *_check_trackers(run, runtime, whose),
        *_check_policy(run, runtime, limits, whose),
        *_check_metadata(run, limits, whose),
    ]


def _describe(runtime: ClusterLoRARuntime | None) -> str:
    return f"ClusterLoRARuntime {runtime.metadata.name}" if runtime is not None else "a ClusterLoRARuntime"


def _check_size(run: LoRAFineTune, runtime: ClusterLoRARuntime | None, limits: Limits, whose: str) -> Iterator[str]:
    parallelism = run.spec.parallelism
    if limits.max_nodes is not None and parallelism.nodes > limits.max_nodes:
        yield (
            f"spec.parallelism.nodes is {parallelism.nodes}, but {whose} allows at most {limits.max_nodes} "
            "(limits.maxNodes)"
        )
    base = runtime.spec.pod_template.resources if runtime is not None else ResourceRequirements()
    named = count_gpus(merge_resources(run.spec.pod_template.resources, base))
    gpus = parallelism.nodes * (parallelism.gpus_per_node + sum(named.values()))
    if limits.max_gpus is not None and gpus > limits.max_gpus:
        sort = f"nodes * (gpusPerNode + {' + '.join(named)})" if named else "nodes * gpusPerNode"
        field = "spec.parallelism and spec.podTemplate.resources ask" if named else "spec.parallelism asks"
        yield f"{field} for {gpus} GPUs ({sort}), but {whose} allows at most {limits.max_gpus} (limits.maxGPUs)"


def is_gpu(resource: str) -> bool:
    """Whether ``resource`` is a GPU or a part of one: VENDOR/gpu, VENDOR/gpu.shared, nvidia.com/mig-1g.10gb."""
    vendor, _, name = resource.partition("/")
    return bool(_GPU_PART.fullmatch(name)) or (vendor == "gpu.intel.com" and name in _INTEL_GPUS)


def count_gpus(resources: ResourceRequirements) -> dict[str, int]:
    """How many GPUs, and parts of GPUs, a pod asks for by name."""
    asked = resources.requests | resources.limits
    return {name: parse_quantity(asked[name]) for name in sorted(asked) if is_gpu(name)}


def parse_quantity(quantity: str) -> int:
    """A quantity of Kubernetes, such as 2 or 4k, rounded up."""
    return math.ceil(parse_exactly(quantity))


def _check_sources(run: LoRAFineTune, limits: Limits, whose: str) -> Iterator[str]:
    dataset = run.spec.dataset
    uris = [
        ("baseModel.uri", run.spec.base_model.uri, limits.model_uri_prefixes, "modelUriPrefixes"),
        ("dataset.train.uri", dataset.train.uri, limits.data_uri_prefixes, "dataUriPrefixes"),
        ("dataset.eval.uri", dataset.eval and dataset.eval.uri, limits.data_uri_prefixes, "dataUriPrefixes"),
    ]
    for field, uri, prefixes, rule in uris:
        if uri and prefixes is not None and not any(is_below(uri, prefix) for prefix in prefixes):
            yield f"spec.{field} is {uri}, but {whose} allows only {', '.join(prefixes)} (limits.{rule})"


def _check_store(run: LoRAFineTune, runtime: ClusterLoRARuntime | None, whose: str) -> Iterator[str]:
    store = run.spec.publish.store
    if runtime is None or store is None:
        return
    prefixes, roots = runtime.spec.limits.store_prefixes, _store_roots(runtime)
    store = store.rstrip("/")
    if prefixes is not None and not any(is_below(store, root) for root in roots):
        yield f"spec.publish.store is {store}, but {whose} allows only {', '.join(roots)} (limits.storePrefixes)"
        return
    # Where the adapter's files end up counts, not where the store begins: s3://b with the namespace a is below s3://b/a.
    own = run.metadata.namespace
    root = _find_foreign_root(f"{store}/{own}/{run.spec.publish.name or run.metadata.name}", roots, own)
    if root is not None:
        yield (
            f"spec.publish.store is {store}, but below {root} a run may publish only to {root} itself or below "
            f"{root}/{own}, the prefix of its own namespace (store and limits.storePrefixes of {whose})"
        )


def _store_roots(runtime: ClusterLoRARuntime) -> list[str]:
    """What ``runtime`` shares out among namespaces: PREFIX/NAMESPACE belongs to NAMESPACE."""
    named = (*(runtime.spec.limits.store_prefixes or ()), *filter(None, [runtime.spec.store]))
    return [root.rstrip("/") for root in named]


def _find_foreign_root(target: str, roots: Iterable[str], own: str) -> str | None:
    """The innermost of ``roots`` that ``target`` lies below, if it lies there outside of what the namespace has."""
    root = max((root for root in roots if is_below(target, root)), key=len, default=None)
    return None if root is None or is_below(target, f"{root}/{own}") else root


def _check_origin(run: LoRAFineTune, runtime: ClusterLoRARuntime | None, whose: str) -> Iterator[str]:
    """What ``resumeFrom`` names has to be the namespace's own: with ``name`` it lies where the run publishes to."""
    origin, own = run.spec.checkpoint.resume_from, run.metadata.namespace
    store = run.spec.publish.store or (runtime.spec.store if runtime is not None else None)
    if origin is None or store is None:
        return
    roots = _store_roots(runtime) if runtime is not None else []
    allowed = [f"{root}/{own}" for root in dict.fromkeys([store.rstrip("/"), *roots])]
    uri = origin.uri.rstrip("/") if origin.uri is not None else f"{allowed[0]}/{origin.name}/checkpoints"
    parts = re.sub("%2e", ".", uri.partition("://")[2], flags=re.IGNORECASE).split("/")
    climbs = not {"", ".", ".."}.isdisjoint(parts)
    inside = any(uri.startswith(f"{root}/") for root in allowed)
    if climbs or not inside or _find_foreign_root(uri, roots, own) is not None:
        field = "uri" if origin.uri is not None else "name"
        yield (
            f"spec.checkpoint.resumeFrom.{field} is {origin.uri or origin.name}, but a run of namespace {own} may go "
            f"on only from checkpoints below {' or '.join(allowed)}: copy the checkpoint there, or have PREFIX of "
            f"PREFIX/{own} listed in limits.storePrefixes of {whose}"
        )


def _check_trackers(run: LoRAFineTune, runtime: ClusterLoRARuntime | None, whose: str) -> Iterator[str]:
    tracking = run.spec.tracking
    endpoints = runtime.spec.endpoints if runtime is not None else None
    allowed = (endpoints.tracking if endpoints is not None else None) or []
    named = {
        "tracking.wandb.baseUrl": tracking.wandb and tracking.wandb.base_url,
        "tracking.mlflow.trackingUri": tracking.mlflow and tracking.mlflow.tracking_uri,
    }
    for field, uri in named.items():
        if uri and not allows_tracker(allowed, uri):
            yield f"spec.{field} is {uri}, which is not allowed: add it to endpoints.tracking of {whose}"


def _check_policy(run: LoRAFineTune, runtime: ClusterLoRARuntime | None, limits: Limits, whose: str) -> Iterator[str]:
    policy = run.spec.run_policy
    longest = limits.max_active_deadline_seconds
    if longest is not None and (policy.active_deadline_seconds or 0) > longest:
        yield (
            f"spec.runPolicy.activeDeadlineSeconds is {policy.active_deadline_seconds}, but {whose} allows at most "
            f"{longest} (limits.maxActiveDeadlineSeconds)"
        )
    if limits.queue_required and not (policy.queue_name or (runtime is not None and runtime.spec.queue_name)):
        yield f"spec.runPolicy.queueName is not set, but {whose} requires a queue (limits.queueRequired)"
    names = limits.priority_class_names
    for field, priority in (
        ("priorityClassName", policy.priority_class_name),
        ("workloadPriorityClassName", policy.workload_priority_class_name),
    ):
        if priority and (priority.startswith(_SYSTEM) if names is None else priority not in names):
            rule = f"only {', '.join(names) or 'none'}" if names is not None else f"none that begins with {_SYSTEM}"
            yield (
                f"spec.runPolicy.{field} is {priority}, but {rule} is allowed: limits.priorityClassNames of {whose} "
                "lists what is"
            )


def _check_metadata(run: LoRAFineTune, limits: Limits, whose: str) -> Iterator[str]:
    template = run.spec.pod_template
    for field, values, names in (
        ("annotations", template.annotations, [*_TOPOLOGY, *(limits.annotation_names or ())]),
        ("labels", template.labels, limits.label_names),
    ):
        rule = f"limits.{field.removesuffix('s')}Names"
        for name in sorted(values):
            if not allows_name(names or (), name):
                yield f"spec.podTemplate.{field} has {name}, which is not allowed: add it to {rule} of {whose}"


def allows_name(names: Iterable[str], name: str) -> bool:
    """Whether ``name`` of a label or an annotation is one of ``names``: in full, as DOMAIN/*, or all by *."""
    domain, slash, _ = name.rpartition("/")
    return not {name, f"{domain}{slash}*", "*"}.isdisjoint(names)


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether an object with ``labels`` is one of those that ``selector`` names, as Kubernetes decides it."""
    return (selector.match_labels or {}).items() <= labels.items() and all(
        _holds(one, labels) for one in selector.match_expressions or ()
    )


def _holds(requirement: LabelRequirement, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(requirement.key), requirement.values or ()
    return {
        "In": value is not None and value in values,
        "NotIn": value is None or value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[requirement.operator]


def describe_selector(selector: LabelSelector) -> str:
    """The selector as kubectl writes it: ``team=a,tier in (gold,silver),!legacy``."""
    words = {
        "In": "{key} in ({values})",
        "NotIn": "{key} notin ({values})",
        "Exists": "{key}",
        "DoesNotExist": "!{key}",
    }
    return ",".join(
        [
            *(f"{key}={value}" for key, value in (selector.match_labels or {}).items()),
            *(
                words[one.operator].format(key=one.key, values=",".join(one.values or ()))
                for one in selector.match_expressions or ()
            ),
        ]
    )
