"""Before anything is created for a run: what it takes from its runtime, and whether that lets it begin. All pure.

A run takes its runtime once: the limits are looked at, and the rest is written to ``status.runtime``, with no other
effect. From then on the runtime itself is not looked at any more. So an operator that is killed, or a runtime that is
edited, between this and any later step changes nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from lora_api import ClusterLoRARuntime, FailureClass, LoRAFineTune
from lora_operator.lifecycle.outcomes import PREFLIGHT, decide_failure, decide_wait
from lora_operator.policies.amounts import check_amounts, check_runtime_amounts
from lora_operator.policies.limits import check_limits, describe_selector, selects
from lora_operator.settings import RunSettings
from lora_operator.state.failures import new_failure
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan
from lora_operator.state.runtimes import build_snapshot
from lora_operator.wording import with_remedy

_NOT_FOUND_REMEDY = (
    "Create it, or delete this LoRAFineTune and create it again with another one (kubectl get clr). The run starts by "
    "itself once it is there."
)


_CORRECT_RUNTIME = "Have it corrected by an administrator. The run starts by itself then."

_FORBIDDEN = with_remedy(
    "The runtime has allowedNamespaces, and the operator may not read the labels of this namespace",
    "Bring the operator's role to its version (helm upgrade). The run starts by itself then.",
)
_FORBIDDEN_SECONDS = 30.0


def asks_for_namespace(runtime: ClusterLoRARuntime | None) -> bool:
    """Whether the labels of a run's namespace decide if it may take ``runtime``."""
    return runtime is not None and runtime.spec.allowed_namespaces is not None


def decide_runtime(observed: Observed, now: datetime, settings: RunSettings) -> Plan | None:
    """What to do next about the runtime of a run; ``None`` once that is settled."""
    run, runtime = observed.run, observed.runtime
    if run.spec.run_policy.suspend or observed.live_job() is not None:
        return None
    if observed.has_begun():
        return None if run.spec.publish.store else _decide_lost(observed, now, settings)
    if runtime is None and run.spec.runtime_ref is not None:
        message = f"spec.runtimeRef.name: there is no ClusterLoRARuntime {run.spec.runtime_ref.name}"
        return decide_wait("RuntimeNotFound", with_remedy(message, _NOT_FOUND_REMEDY), None)
    if observed.namespace_labels is None and asks_for_namespace(runtime):
        return decide_wait("OperatorForbidden", _FORBIDDEN, _FORBIDDEN_SECONDS)
    if runtime is not None and (wrong := check_runtime_amounts(runtime.spec)):
        message = f"ClusterLoRARuntime {runtime.metadata.name}: {'; '.join(wrong)}"
        return decide_wait("InvalidSpec", with_remedy(message, _CORRECT_RUNTIME), None)
    snapshot = build_snapshot(runtime) if runtime is not None else None
    refusal = find_refusal(run, runtime, observed.namespace_labels)
    if refusal is not None:
        return replace(
            decide_failure(observed, PREFLIGHT, new_failure(refusal[0], PREFLIGHT, refusal[1], now), now, settings),
            runtime=snapshot,
        )
    if snapshot is None:
        return None
    message = f"Takes ClusterLoRARuntime {snapshot.name} as it is now (generation {snapshot.generation})"
    return replace(decide_wait("RuntimeTaken", message, 0.0), runtime=snapshot)


def _decide_lost(observed: Observed, now: datetime, settings: RunSettings) -> Plan:
    """Ends a run that began with a store of its runtime, and whose snapshot somebody has taken away."""
    message = "spec.publish.store is not set, and status.runtime, which had one when the run began, is gone"
    failure = new_failure(FailureClass.BAD_SPEC, observed.run.status.attempt, message, now)
    return decide_failure(observed, failure.attempt, failure, now, settings)


def find_refusal(
    run: LoRAFineTune, runtime: ClusterLoRARuntime | None, namespace_labels: Mapping[str, str] | None = None
) -> tuple[FailureClass, str] | None:
    """Why ``run`` cannot begin with ``runtime``, or ``None``."""
    if wrong := check_amounts(run.spec.pod_template.resources, "spec.podTemplate.resources"):
        return FailureClass.BAD_SPEC, "; ".join(wrong)
    foreign = _find_foreign(run, runtime, namespace_labels or {})
    violations = [foreign] if foreign else check_limits(run, runtime)
    if violations:
        return FailureClass.RUNTIME_REFUSED, "; ".join(violations)
    if run.spec.publish.store or (runtime is not None and runtime.spec.store):
        return None
    why = f"ClusterLoRARuntime {runtime.metadata.name} has no store" if runtime is not None else "there is no runtime"
    return FailureClass.BAD_SPEC, f"spec.publish.store is not set, and {why}"


def _find_foreign(
    run: LoRAFineTune, runtime: ClusterLoRARuntime | None, namespace_labels: Mapping[str, str]
) -> str | None:
    """Why the namespace of ``run`` may not take ``runtime``. Of its other rules it is not told then."""
    selector = runtime.spec.allowed_namespaces if runtime is not None else None
    if runtime is None or selector is None or selects(selector, namespace_labels):
        return None
    name = runtime.metadata.name
    field = (
        f"spec.runtimeRef.name is {name}" if run.spec.runtime_ref else f"spec.runtimeRef is not set, so it is {name}"
    )
    return (
        f"{field}, but ClusterLoRARuntime {name} is for namespaces with the labels {describe_selector(selector)} only "
        f"(allowedNamespaces), and namespace {run.metadata.namespace} does not have them"
    )
