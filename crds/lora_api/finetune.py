"""The LoRAFineTune resource: what a user asks for.

Every bound, default and description here becomes the CRD (``make generate``) and the API reference. A field exists
only once the trainer or the operator acts on it.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from lora_api._base import ApiModel, CelRule
from lora_api.pods import PodTemplate, SecretRef
from lora_api.sources import BaseModelSource, Dataset
from lora_api.status import LoRAFineTuneStatus

GROUP = "lorafinetune.io"
VERSION = "v1alpha1"
KIND: Literal["LoRAFineTune"] = "LoRAFineTune"
PLURAL = "lorafinetunes"
API_VERSION: Literal["lorafinetune.io/v1alpha1"] = "lorafinetune.io/v1alpha1"

MAX_NAME_LENGTH = 52
"""Longest name of a run: its pods are called ``<name>-<attempt>-<index>`` and a host name has at most 63 characters."""

MAX_GLOBAL_BATCH_SIZE = 65536

StoreUri = Annotated[str, StringConstraints(pattern=r"^(s3|file)://[!-~]+$", max_length=512)]
LabelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+$", min_length=1, max_length=128)]


class LoRA(ApiModel):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + (alpha / r) * B A."""

    r: int = Field(16, ge=1, le=512, description="Rank of the adapter matrices. 512 is the most that vLLM serves.")
    alpha: int = Field(
        32, ge=1, le=4096, description="Scale of the adapter; its effect is alpha / r. At most 16 times r."
    )
    dropout: float = Field(0.0, ge=0.0, le=0.5, description="Dropout before the adapter, as a probability (0 to 0.5).")
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] = Field(
        ["all-linear"],
        description="Modules that get an adapter, by the last part of their name (q_proj). [all-linear]: every linear "
        "layer but the output head.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )

    cel_rules = (
        CelRule(
            rule="self.alpha <= 16 * self.r",
            message="alpha may be at most 16 times r: a larger scale diverges",
            field_path=".alpha",
        ),
        CelRule(
            rule="!('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            message="all-linear stands for every linear layer, so it must be the only entry of targetModules",
            field_path=".targetModules",
        ),
    )


class Quantization(ApiModel):
    """How the frozen base weights are held (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

    type: Literal["nf4", "none"] = Field(
        "nf4", description="nf4: 4-bit NormalFloat through bitsandbytes. none: the compute dtype."
    )
    double_quant: bool = Field(
        default=True, description="Quantize the quantization constants too: 0.37 bits less a weight."
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Type of the matrix products. auto: bfloat16 on GPUs, float32 on CPUs."
    )


class Training(ApiModel):
    """The optimization. AdamW with the usual betas 0.9 and 0.999."""

    epochs: float | None = Field(
        None, gt=0.0, le=1000.0, description="Passes over the training records. Exactly one of epochs and maxSteps."
    )
    max_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimizer steps. Exactly one of epochs and maxSteps."
    )
    learning_rate: float = Field(2e-4, gt=0.0, le=0.1, description="Peak learning rate.")
    global_batch_size: int = Field(
        16,
        ge=1,
        le=MAX_GLOBAL_BATCH_SIZE,
        description="Sequences per optimizer step over all GPUs of all nodes. The gradient accumulation is derived: "
        "globalBatchSize / (microBatchSize * processes).",
    )
    micro_batch_size: int = Field(1, ge=1, le=1024, description="Sequences per GPU in one forward pass.")
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_ratio: float = Field(
        0.03, ge=0.0, le=0.5, description="Share of the steps (0 to 0.5) in which the learning rate rises from 0."
    )
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(
        1.0, gt=0.0, le=1000.0, description="Gradients are scaled down to this L2 norm over all adapter weights."
    )
    gradient_checkpointing: bool = Field(
        default=True, description="Recompute activations in the backward pass: less memory, about a fifth slower."
    )
    seed: int = Field(42, ge=0, le=2_147_483_647, description="Seed of the data order, of dropout and of the adapter.")
    eval_every_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Also evaluate every so many steps. Default: only before and after."
    )
    logging_steps: int = Field(1, ge=1, le=10_000, description="Report progress every so many steps.")

    cel_rules = (
        CelRule(
            rule="has(self.epochs) != has(self.maxSteps)",
            message="set exactly one of epochs and maxSteps",
            field_path=".maxSteps",
        ),
    )


class Parallelism(ApiModel):
    """How many machines and processes train together. Weights are sharded over all of them (FSDP2)."""

    nodes: int = Field(1, ge=1, le=64, description="Nodes (pods) in the gang.")
    gpus_per_node: int = Field(
        1, ge=0, le=16, description="GPUs of each node, one process each. 0 trains on the CPU with one process a node."
    )

    cel_rules = (
        CelRule(
            rule="self.nodes * self.gpusPerNode <= 512",
            message="nodes * gpusPerNode may be at most 512",
            field_path=".nodes",
        ),
    )

    @property
    def processes_per_node(self) -> int:
        """Training processes in one pod: one a GPU, or one on the CPU."""
        return max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Training processes over all nodes."""
        return self.nodes * self.processes_per_node


class Checkpoint(ApiModel):
    """What a restart goes on from. Checkpoints go to the store and are deleted when the adapter is published."""

    every_steps: int = Field(100, ge=1, le=10_000_000, description="Save a checkpoint every so many optimizer steps.")
    keep: int = Field(2, ge=1, le=20, description="Complete checkpoints to keep; older ones are deleted.")


class Publish(ApiModel):
    """Where the adapter goes: STORE/NAMESPACE/NAME/sha256-DIGEST/."""

    store: StoreUri = Field(description="Bucket and prefix: s3://BUCKET/PREFIX, on any store with the S3 API.")
    name: LabelName | None = Field(
        None, description="Name of the adapter in the store. Its versions count up. Default: the name of this resource."
    )
    sample_prompts: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=4096)]], Field(max_length=16)
    ] = Field(
        [],
        description="Prompts that are answered before and after training, for the report. Default: the first records "
        "of the evaluation set.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )

    cel_rules = (
        CelRule(
            rule="self.store.matches('^s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/[^/]+)*/?$')",
            message="store must be s3://BUCKET/PREFIX",
            field_path=".store",
        ),
        CelRule(
            rule="!self.store.matches('/[.][.]?(/|$)')",
            message="the prefix of store may not have . or .. as one of its parts",
            field_path=".store",
        ),
    )


class Credentials(ApiModel):
    """How the pods reach the store and the model hub. The operator itself never reads the Secret."""

    secret_ref: SecretRef = Field(
        description="Secret whose keys become environment variables of the pods: AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, HF_TOKEN."
    )


class RunPolicy(ApiModel):
    """What happens when something fails."""

    max_restarts: int = Field(
        3,
        ge=0,
        le=100,
        description="Restarts of the whole gang that failures of the run itself may use up. Restarts after a lost "
        "node, an eviction or a preemption are not counted.",
    )


_CHUNK = (
    "(self.training.microBatchSize * self.parallelism.nodes * "
    "(self.parallelism.gpusPerNode > 0 ? self.parallelism.gpusPerNode : 1))"
)
_GLOBAL = "self.training.globalBatchSize"


def _decimal(number: str) -> str:
    """CEL for the digits of ``number``, an expression from 1 to 99999.

    ``string(number)`` cannot be joined to other text: the API server takes its length to be unbounded and refuses the
    cost of the rule. A piece of a constant has a bound.
    """
    digits = [
        f"'0123456789'.substring({number} / {power} % 10, {number} / {power} % 10 + 1)"
        for power in (10000, 1000, 100, 10, 1)
    ]
    leading = (
        f"({number} < {power} ? '' : {digit})" for power, digit in zip((10000, 1000, 100, 10), digits, strict=False)
    )
    return " + ".join((*leading, digits[-1]))


# Only evaluated where the chunk is at most MAX_GLOBAL_BATCH_SIZE. map() over one value is how CEL names a value.
_NEAREST_SIZES = (
    f"[{_CHUNK}].map(chunk, [{_GLOBAL} / chunk * chunk].map(below, "
    "'globalBatchSize must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1) = ' + "
    f"{_decimal('chunk')} + '; the nearest: ' + "
    f"(below == 0 ? '' : {_decimal('below')}) + "
    f"(below == 0 || below + chunk > {MAX_GLOBAL_BATCH_SIZE} ? '' : ' and ') + "
    f"(below + chunk > {MAX_GLOBAL_BATCH_SIZE} ? '' : {_decimal('(below + chunk)')})"
    ")[0])[0]"
)


class LoRAFineTuneSpec(ApiModel):
    """One fine-tune. It cannot be changed once created: delete it and create another."""

    base_model: BaseModelSource = Field(description="The model that the adapter is trained on.")
    dataset: Dataset = Field(description="What to learn from, and what to measure with.")
    lora: LoRA = Field(default_factory=LoRA, description="Shape of the adapter.")
    quantization: Quantization = Field(
        default_factory=Quantization, description="How the frozen base weights are held."
    )
    training: Training = Field(description="The optimization.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How many nodes and GPUs train together.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="What a restart goes on from.")
    publish: Publish = Field(description="Where the adapter goes.")
    credentials: Credentials | None = Field(None, description="How the pods reach the store and the model hub.")
    run_policy: RunPolicy = Field(default_factory=RunPolicy, description="What happens when something fails.")
    pod_template: PodTemplate = Field(default_factory=PodTemplate, description="What the pods of the gang get.")

    cel_rules = (
        CelRule(
            rule=f"{_CHUNK} <= {MAX_GLOBAL_BATCH_SIZE}",
            message=f"microBatchSize * nodes * max(gpusPerNode, 1) may be at most {MAX_GLOBAL_BATCH_SIZE}",
            field_path=".training.microBatchSize",
        ),
        CelRule(
            rule=f"{_CHUNK} > {MAX_GLOBAL_BATCH_SIZE} || {_GLOBAL} % {_CHUNK} == 0",
            message="globalBatchSize must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1)",
            message_expression=_NEAREST_SIZES,
            field_path=".training.globalBatchSize",
        ),
        CelRule(
            rule="!has(self.training.evalEverySteps) || has(self.dataset.eval) || "
            "!has(self.dataset.evalFraction) || self.dataset.evalFraction > 0.0",
            message="evalEverySteps needs records to evaluate on: set dataset.eval, or an evalFraction above 0",
            field_path=".training.evalEverySteps",
        ),
        CelRule(
            rule="self == oldSelf",
            message="spec cannot be changed once created: delete this LoRAFineTune and create another one",
        ),
    )


class ObjectMeta(ApiModel):
    """The part of Kubernetes' ObjectMeta that the operator reads."""

    model_config = {"extra": "ignore"}

    name: str
    namespace: str
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class LoRAFineTune(ApiModel):
    """Fine-tunes a language model with QLoRA over one or more nodes and publishes the adapter."""

    api_version: Literal["lorafinetune.io/v1alpha1"] = API_VERSION
    kind: Literal["LoRAFineTune"] = KIND
    metadata: ObjectMeta
    spec: LoRAFineTuneSpec = Field(description="What is asked for.")
    status: LoRAFineTuneStatus = Field(default_factory=LoRAFineTuneStatus, description="What the operator has seen.")

    cel_rules = (
        CelRule(
            rule=f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
            message=f"metadata.name may have at most {MAX_NAME_LENGTH} characters, so that the names of its pods fit "
            "in 63",
        ),
        CelRule(
            rule="self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            message="metadata.name must start with a letter and have only a-z, 0-9 and '-': it becomes the name of a "
            "Service",
        ),
    )
