"""The status of a LoRAFineTune: what the operator has seen. Written by the operator only."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lora_api._base import LongMessage, Measure, RecordModel, ShortMessage, Time, format_time
from lora_api.failures import FailureClass
from lora_api.preflight import Pins, RunPlan
from lora_api.reading import OpenEnum
from lora_api.served import ServedEvaluation

__all__ = [
    "MAX_AVOIDED_NODES",
    "MAX_FAILURES",
    "MAX_HISTORY",
    "STATUS_VERSION",
    "AdapterStatus",
    "AvoidedNode",
    "CheckpointStatus",
    "Condition",
    "ConditionType",
    "Failure",
    "LoRAFineTuneStatus",
    "Phase",
    "Progress",
    "RuntimeSnapshot",
    "Time",
    "TrainerPin",
    "format_time",
]

STATUS_VERSION = 2
"""Of the statuses that this version writes: 2 has version, trainer and the node of each failure."""

MAX_FAILURES = 10
MAX_HISTORY = 100
MAX_AVOIDED_NODES = 20


def _up_to(entries: int) -> dict[str, Any]:
    """Room in the CRD alone: a later version may keep more than this one, and this one has to read it."""
    return {"maxItems": entries}


class Phase(OpenEnum):
    """Where a run is, in one word, for people. The operator never decides by it."""

    PENDING = "Pending"
    PREFLIGHT = "Preflight"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    PUBLISHING = "Publishing"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


class ConditionType(OpenEnum):
    """Types of conditions. Ready, Reconciling and Stalled follow kstatus (sigs.k8s.io/cli-utils)."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    PREFLIGHT_PASSED = "PreflightPassed"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    PUBLISHED = "Published"
    COMPLETE = "Complete"
    FAILED = "Failed"
    CLEANED_UP = "CleanedUp"


class Condition(RecordModel):
    """A metav1.Condition."""

    type: Annotated[str, Field(min_length=1, max_length=316)] = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: Annotated[str, Field(min_length=1, max_length=1024)] = Field(description="Why, in one CamelCase word.")
    message: LongMessage = Field("", description="Why, in a sentence for people.")
    last_transition_time: Time = Field(description="When status last changed.")
    observed_generation: int = Field(0, ge=0, description="Generation of the resource that this is about.")


class Progress(RecordModel):
    """How far training is. At most 15 seconds old while it runs."""

    step: int = Field(0, ge=0, description="Optimizer steps done.")
    total_steps: int = Field(0, ge=0, description="Optimizer steps in all.")
    percent: int = Field(0, ge=0, le=100, description="Share of the steps that is done, in percent.")
    summary: str = Field("", description="Percent for people, such as 42%.")
    epoch: Measure = Field(None, description="Passes over the training records so far.")
    loss: Measure = Field(None, description="Training loss (mean negative log likelihood per token, nats).")
    eval_loss: Measure = Field(None, description="Last evaluation loss (nats per token).")
    learning_rate: Measure = Field(None, description="Learning rate of the last step.")
    grad_norm: Measure = Field(None, description="L2 norm of the gradient before clipping.")
    tokens_per_second: Measure = Field(None, description="Tokens per second over all GPUs.")
    eta_seconds: int | None = Field(None, ge=0, description="Seconds until the last step, as it looks now.")
    eta: str | None = Field(None, description="The same for people, such as 1m20s.")
    at: Time | None = Field(None, description="When the trainer reported this.")
    history: list[Annotated[list[float], Field(min_length=2, json_schema_extra=_up_to(8))]] = Field(
        [],
        description="Pairs of step and training loss, thinned evenly.",
        json_schema_extra={"x-kubernetes-list-type": "atomic", **_up_to(10 * MAX_HISTORY)},
    )


class Failure(RecordModel):
    """Why an attempt ended."""

    attempt: int = Field(ge=0, description="Attempt that failed; 0 is what comes before the first.")
    failure_class: FailureClass = Field(
        alias="class",
        description="Kind of failure: docs/reference.md.",
        json_schema_extra={"enum": [str(known) for known in FailureClass]},  # kubectl explain shows them
    )
    reason: ShortMessage = Field("", description="What Kubernetes or the trainer calls it.")
    message: LongMessage = Field("", description="What happened.")
    remedy: ShortMessage = Field("", description="What to do about it.")
    pod: str | None = Field(None, description="Pod in which it began.")
    node: str | None = Field(None, description="Node of that pod.")
    rank: int | None = Field(None, ge=0, description="Process in which it began, by its rank.")
    step: int | None = Field(None, ge=0, description="Last optimizer step before it.")
    micro_batch_size: int | None = Field(None, ge=1, description="Sequences that each process took at once.")
    exit_code: int | None = Field(None, description="Exit code of the pod's container.")
    log_tail: LongMessage | None = Field(None, description="Last lines of the pod's log, at most 4096 characters.")
    at: Time = Field(description="When it happened.")


class AdapterStatus(RecordModel):
    """The published adapter."""

    uri: str = Field(description="Directory of the adapter in the store.")
    merged_uri: str | None = Field(
        None, description="Directory of the whole model with the adapter merged into it (publish.mergeBase)."
    )
    digest: str = Field(description="Content digest, sha256:HEX.")
    version: int = Field(ge=1, description="Version under the adapter's name, counted from 1.")
    served_name: str = Field(description="Name to serve it under: NAME-vVERSION.")
    rank: int = Field(ge=1, description="LoRA rank.")
    serving_max_lora_rank: int = Field(ge=1, description="Smallest --max-lora-rank of vLLM that can serve it.")
    size_bytes: int = Field(ge=0, description="Size of the adapter's own files, in bytes.")
    eval_loss_before: Measure = Field(
        None, description="Evaluation loss before training, on the base model that is trained on (nats per token)."
    )
    eval_loss_after: Measure = Field(None, description="The same after training.")
    eval_share_after: Measure = Field(
        None,
        description="Share of the evaluation records (0 to 1) that the adapter then writes to the letter; of pairs, of "
        "those whose chosen answer has the larger reward.",
    )
    served: ServedEvaluation | None = Field(
        None, description="The adapter on its base model as it is served (publish.servedDtype)."
    )
    gate_base: str | None = Field(
        None, description="Base model whose losses publish.gate looked at: served or training."
    )


class RuntimeSnapshot(RecordModel):
    """The ClusterLoRARuntime as the run found it. Later edits of it, and its deletion, do not concern the run."""

    name: str = Field(description="Name of the ClusterLoRARuntime.")
    generation: int = Field(0, ge=0, description="Its generation.")
    spec: dict[str, Any] = Field(
        {},
        description="Its spec, but for allowedNamespaces and the limits other than maxActiveDeadlineSeconds.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )


class TrainerPin(RecordModel):
    """The trainer of a run: every attempt has the same."""

    image: str = Field(description="Image of the training pods.")
    run_version: int = Field(1, ge=1, description="Newest version of the run document that this image reads.")


class CheckpointStatus(RecordModel):
    """The newest complete checkpoint."""

    step: int = Field(ge=0, description="Optimizer step that it was saved after.")
    at: Time = Field(description="When the operator learned of it.")


class AvoidedNode(RecordModel):
    """A node where the run failed."""

    name: str = Field(description="Its name.")
    reason: str = Field("", description="Class of the failure.")
    since: Time = Field(description="When it failed; forgotten a day later.")


class LoRAFineTuneStatus(RecordModel):
    """What the operator has seen."""

    version: int = Field(1, ge=1, description="Version of this status document.")
    observed_generation: int = Field(0, ge=0, description="Generation of the resource that this status is about.")
    phase: Phase | None = Field(
        None,
        description="Where the run is, for people: Pending, Preflight, Queued, Starting, Running, Restarting, "
        "Publishing, Succeeded, Failed, Suspended. A later version may know more.",
    )
    reason: str | None = Field(None, description="Why the run is in this phase, in one word.")
    attempt: int = Field(0, ge=0, description="Number of the current attempt, counted from 1.")
    runtime: RuntimeSnapshot | None = Field(None, description="The runtime that the run took when it started.")
    trainer: TrainerPin | None = Field(None, description="The trainer that the run began with, and keeps.")
    listed_keys: Literal[True] | None = Field(
        None,
        description="The pods get the listed keys of their Secret only. Absent in a run of an older version.",
    )
    start_time: Time | None = Field(None, description="When the first attempt was created.")
    completion_time: Time | None = Field(None, description="When the run succeeded or failed for good.")
    conditions: list[Condition] = Field(
        [],
        description="Conditions. Ready, Reconciling and Stalled follow kstatus.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"], **_up_to(64)},
    )
    progress: Progress | None = Field(None, description="How far training is.")
    failures: list[Failure] = Field(
        [],
        description="Why attempts ended, the last 10.",
        json_schema_extra={"x-kubernetes-list-type": "atomic", **_up_to(10 * MAX_FAILURES)},
    )
    failed_preflights: int = Field(0, ge=0, description="Preflights that failed so far.")
    pins: Pins | None = Field(None, description="What the sources held at the preflight. Each attempt reads the same.")
    plan: RunPlan | None = Field(None, description="How the run is trained, as the preflight planned it.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Sequences that each process takes at once, since memory ran out with more."
    )
    charged_restarts: int = Field(
        0, ge=0, description="Restarts used up of runPolicy.maxRestarts since lastCheckpoint."
    )
    observed_retry: int | None = Field(None, ge=0, description="runPolicy.retry as it was last acted upon.")
    retried_attempts: int | None = Field(None, ge=0, description="Attempts and failed preflights before that.")
    preemptions: int = Field(0, ge=0, description="Times that the queue took the quota back.")
    last_checkpoint: CheckpointStatus | None = Field(
        None, description="Newest complete checkpoint. A newer one sets chargedRestarts to 0."
    )
    recent_failures: int | None = Field(
        None, ge=0, description="Failures since lastCheckpoint. Each doubles the pause before the next attempt."
    )
    failing_since: Time | None = Field(
        None, description="When the first of them was seen. Time without room or quota is added."
    )
    avoided_nodes: list[AvoidedNode] | None = Field(
        None,
        description="Nodes that no pod goes to, the newest 20.",
        json_schema_extra={"x-kubernetes-list-type": "atomic", **_up_to(10 * MAX_AVOIDED_NODES)},
    )
    retry_time: Time | None = Field(None, description="When the next attempt starts.")
    suspended_attempt: int = Field(0, ge=0, description="Last attempt that runPolicy.suspend ended.")
    active_seconds: int = Field(
        0,
        ge=0,
        description="Seconds that the whole gang has run, up to the last transition of the condition Running.",
    )
    gpu_seconds: int = Field(0, ge=0, description="activeSeconds times the GPUs of the gang.")
    adapter: AdapterStatus | None = Field(None, description="The published adapter.")
