"""Before anything is created for a run: what it takes from its runtime, and whether that lets it begin. All pure.

A run takes its runtime once: the limits are looked at, and the rest is written to ``status.runtime``, with no other
effect. From then on the runtime itself is not looked at any more. So an operator that is killed, or a runtime that is
edited, between this and any later step changes nothing.
"""

from dataclasses import replace
from datetime import datetime

from lora_api import RULES, ClusterLoRARuntime, Failure, FailureClass, LoRAFineTune
from lora_operator.diagnose import with_remedy
from lora_operator.observed import Observed
from lora_operator.plan import Plan
from lora_operator.runtimes import build_snapshot
from lora_operator.settings import Settings
from lora_operator.verdicts import PREFLIGHT, decide_failure, decide_wait

_NOT_FOUND_REMEDY = (
    "Create it, or delete this LoRAFineTune and create it again with another one (kubectl get clr). The run starts by "
    "itself once it is there."
)


def decide_runtime(observed: Observed, now: datetime, settings: Settings) -> Plan | None:
    """What to do next about the runtime of a run; ``None`` once that is settled."""
    run, runtime = observed.run, observed.runtime
    if run.spec.run_policy.suspend or observed.live_job() is not None:
        return None
    if observed.has_begun():
        return None if run.spec.publish.store else _decide_lost(observed, now, settings)
    if runtime is None and run.spec.runtime_ref is not None:
        message = f"spec.runtimeRef.name: there is no ClusterLoRARuntime {run.spec.runtime_ref.name}"
        return decide_wait("RuntimeNotFound", with_remedy(message, _NOT_FOUND_REMEDY), None)
    snapshot = build_snapshot(runtime) if runtime is not None else None
    refusal = find_refusal(run, runtime)
    if refusal is not None:
        return replace(decide_failure(observed, PREFLIGHT, _failure(*refusal, now), settings), runtime=snapshot)
    if snapshot is None:
        return None
    message = f"Takes ClusterLoRARuntime {snapshot.name} as it is now (generation {snapshot.generation})"
    return replace(decide_wait("RuntimeTaken", message, 0.0), runtime=snapshot)


def _decide_lost(observed: Observed, now: datetime, settings: Settings) -> Plan:
    """Ends a run that began with a store of its runtime, and whose snapshot somebody has taken away."""
    message = "spec.publish.store is not set, and status.runtime, which had one when the run began, is gone"
    failure = _failure(FailureClass.BAD_SPEC, message, now).model_copy(update={"attempt": observed.run.status.attempt})
    return decide_failure(observed, failure.attempt, failure, settings)


def _failure(failure_class: FailureClass, message: str, now: datetime) -> Failure:
    return Failure(
        attempt=PREFLIGHT,
        failure_class=failure_class,
        reason=str(failure_class),
        message=message,
        remedy=RULES[failure_class].remedy,
        at=now,
    )


def find_refusal(run: LoRAFineTune, runtime: ClusterLoRARuntime | None) -> tuple[FailureClass, str] | None:
    """Why ``run`` cannot begin with ``runtime``, or ``None``."""
    violations = check_limits(run, runtime) if runtime is not None else []
    if violations:
        return FailureClass.RUNTIME_REFUSED, "; ".join(violations)
    if run.spec.publish.store or (runtime is not None and runtime.spec.store):
        return None
    why = f"ClusterLoRARuntime {runtime.metadata.name} has no store" if runtime is not None else "there is no runtime"
    return FailureClass.BAD_SPEC, f"spec.publish.store is not set, and {why}"


def check_limits(run: LoRAFineTune, runtime: ClusterLoRARuntime) -> list[str]:
    """What ``run`` asks for and ``runtime`` does not allow, a sentence each, with the field and the rule."""
    spec, limits = run.spec, runtime.spec.limits
    parallelism, dataset = spec.parallelism, spec.dataset
    gpus = parallelism.nodes * parallelism.gpus_per_node
    whose = f"ClusterLoRARuntime {runtime.metadata.name}"
    found = []
    if limits.max_nodes is not None and parallelism.nodes > limits.max_nodes:
        found.append(
            f"spec.parallelism.nodes is {parallelism.nodes}, but {whose} allows at most {limits.max_nodes} "
            "(limits.maxNodes)"
        )
    if limits.max_gpus is not None and gpus > limits.max_gpus:
        found.append(
            f"spec.parallelism asks for {gpus} GPUs (nodes * gpusPerNode), but {whose} allows at most "
            f"{limits.max_gpus} (limits.maxGPUs)"
        )
    uris = [
        ("baseModel.uri", spec.base_model.uri, limits.model_uri_prefixes, "modelUriPrefixes"),
        ("dataset.train.uri", dataset.train.uri, limits.data_uri_prefixes, "dataUriPrefixes"),
        ("dataset.eval.uri", dataset.eval and dataset.eval.uri, limits.data_uri_prefixes, "dataUriPrefixes"),
    ]
    for field, uri, prefixes, rule in uris:
        if uri and prefixes is not None and not any(_is_below(uri, prefix) for prefix in prefixes):
            found.append(f"spec.{field} is {uri}, but {whose} allows only {', '.join(prefixes)} (limits.{rule})")
    return found


def _is_below(uri: str, prefix: str) -> bool:
    """Whether ``prefix`` is ``uri`` or a directory above it: s3://bucket/a is not above s3://bucket/ab."""
    return uri == prefix or uri.startswith(prefix if prefix.endswith("/") else f"{prefix}/")
