"""What preflight found out about a run before it asks for a GPU. The trainer prints it, the operator keeps it."""

from typing import Literal

from pydantic import Field

from lora_api._base import LongMessage, RecordModel, ShortMessage, Time
from lora_api.adapter import Digest
from lora_api.data import DataReport
from lora_api.failures import FAILURE_RULES, RULES, FailureClass

MAX_SHOWN = 50


class SourcePin(RecordModel):
    """Exactly what a source held. ``revision`` is the commit on a model hub.

    ``digest`` is over names, sizes and contents (etags in a store) of the files that the trainer reads, of sources that
    have no commits.
    """

    uri: str = Field(description="Where it is.")
    revision: str | None = Field(None, description="Commit on the model hub.")
    digest: Digest | None = Field(None, description="Over names, sizes and contents of the files, sha256:HEX.")
    files: int = Field(ge=0, description="Files that are read.")
    size_bytes: int = Field(ge=0, description="Their size in bytes.")


class Pins(RecordModel):
    """What the run reads, so that each attempt reads the same."""

    base_model: SourcePin | None = Field(None, description="The base model.")
    train: SourcePin | None = Field(None, description="The training records.")
    eval: SourcePin | None = Field(None, description="The evaluation records.")


class ModelFacts(RecordModel):
    """The base model, from its configuration and the headers of its files. ``parameters`` counts tied weights once."""

    model_type: str
    parameters: int = Field(ge=0)
    parameters_by_type: dict[str, int] = {}
    weight_files: int = Field(ge=0)
    weight_bytes: int = Field(ge=0)


class MemoryEstimate(RecordModel):
    """Peak memory of each GPU (of each process on CPUs) in GiB, by part. ``fits`` is unset for an unknown device."""

    estimate_gib: float = Field(ge=0, alias="estimateGiB", description="Planned peak of each process, in GiB.")
    safe_gib: float = Field(ge=0, alias="safeGiB", description="The same with a margin, in GiB.")
    device_gib: float | None = Field(None, gt=0, alias="deviceGiB", description="Memory of one GPU, in GiB.")
    fits: bool | None = Field(None, description="Whether the safe figure fits into one GPU.")
    parts: dict[str, float] = Field({}, description="The peak by part, in GiB.")


class RunPlan(RecordModel):
    """How the run is going to be trained.

    ``micro_batch_size`` is unset where it is auto and the device is not known: the training processes settle it then,
    and ``memory`` is that of one sequence. ``shard_size`` processes share one copy of the weights.
    """

    micro_batch_size: int | None = Field(None, ge=1, description="Sequences that a process takes at once.")
    gradient_accumulation_steps: int | None = Field(
        None, ge=1, description="Micro-batches of each process in one optimizer step."
    )
    processes: int = Field(ge=1, description="Training processes, one for each GPU.")
    shard_size: int = Field(ge=1, description="Processes that share one copy of the weights.")
    total_steps: int | None = Field(None, ge=1, description="Optimizer steps in all.")
    tokens_per_epoch: int | None = Field(None, ge=0, description="Tokens in one pass over the training records.")
    memory: MemoryEstimate | None = Field(None, description="Memory of each GPU (of each process on CPUs).")
    served_memory: MemoryEstimate | None = Field(
        None,
        description="The same on the base model as it is served, where that is another one.",
    )
    suggestions: list[str] = Field([], description="What would make it fit, the cheapest first.")


class PreflightOutcome(RecordModel):
    """What a preflight that passed has settled: the part of its result that the operator keeps.

    ``run_version`` is the newest version of the run document that this trainer reads; those before 2 do not say it.
    """

    version: int = Field(1, ge=1)
    run_version: int = Field(1, ge=1)
    pins: Pins = Field(default_factory=Pins)
    plan: RunPlan | None = None


class Problem(RecordModel):
    """Something that ends the run."""

    failure_class: FailureClass = Field(alias="class")
    message: LongMessage


class PreflightResult(RecordModel):
    """The one JSON document that ``lora_trainer preflight`` prints. ``start``: the checkpoint that it goes on from."""

    version: int = Field(1, ge=1)
    outcome: Literal["passed", "failed"]
    pins: Pins = Field(default_factory=Pins)
    model: ModelFacts | None = None
    plan: RunPlan | None = None
    data: DataReport | None = None
    start: str | None = None
    warnings: list[ShortMessage] = []
    problems: list[Problem] = []
    at: Time

    @property
    def failure_class(self) -> FailureClass | None:
        """The class that the whole counts as: one that trying again cannot help, where there is one."""
        order = {rule.failure_class: number for number, rule in enumerate(FAILURE_RULES)}
        found = {problem.failure_class for problem in self.problems}
        return min(found, key=lambda one: (RULES[one].retried, order.get(one, len(order))), default=None)
