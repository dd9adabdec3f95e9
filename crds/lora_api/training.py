"""How the adapter is trained: its shape, the quantized base, the optimization, and how processes work together."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic.config import JsonDict

from lora_api import patterns
from lora_api._base import ApiModel, CelRule
from lora_api.publishing import LabelName, StoreUri, store_rules

MAX_GLOBAL_BATCH_SIZE = 65536

# JSON of some clients has 2.0 or 1e+06 for a whole number (kubectl rewrites them). The API server takes them, and then
# CEL can read neither the field nor whatever is beside it: a rule over several fields fails, and names its section.
# No rule can ask for it beforehand. This one, of the field alone, fails too, and says where to look.
_AS_INTEGER: JsonDict = {
    "x-kubernetes-validations": [{"rule": "self==self", "message": "write it without point or exponent"}]
}

QuantizationType = Literal["nf4", "int8", "none"]
DPOLoss = Literal["sigmoid", "ipo", "hinge"]

ModuleName = Annotated[str, StringConstraints(pattern=patterns.MODULE_NAME, min_length=1, max_length=128)]
NewToken = Annotated[str, StringConstraints(pattern=patterns.PRINTABLE, min_length=2, max_length=64)]


def _module_names(field: str) -> CelRule:
    return CelRule(
        rule=f"self.{field}.all(k, size(k) <= 128 && k.matches('{patterns.MODULE_NAME}'))",
        message=f"a key of {field} must be the last part or parts of a module's name, such as down_proj",
        field_path=f".{field}",
    )


class LoRA(ApiModel):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + (alpha / r) * B A."""

    r: int = Field(
        16,
        ge=1,
        le=512,
        description="Rank of the adapter matrices. 512 is the most that vLLM serves.",
        json_schema_extra=_AS_INTEGER,
    )
    alpha: int = Field(
        32,
        ge=1,
        le=4096,
        description="Scale of the adapter; its effect is alpha / r. At most 16 times r.",
        json_schema_extra=_AS_INTEGER,
    )
    dropout: float = Field(0.0, ge=0.0, le=0.5, description="Dropout before the adapter, as a probability (0 to 0.5).")
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] = Field(
        ["all-linear"],
        description="Modules that get an adapter, by the last part of their name (q_proj). [all-linear]: every linear "
        "layer but the output head.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by alpha / sqrt(r) in place of alpha / r, for large ranks (rsLoRA, arXiv:2312.03732).",
    )
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=512)]], Field(max_length=32)] = Field(
        {},
        description="Other ranks for some modules, by the last part or parts of their name, such as {down_proj: 8}. "
        "The published adapter has the largest.",
    )
    alpha_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=4096)]], Field(max_length=32)] = Field(
        {},
        description="Other values of alpha for some modules, as in rankPattern. They are folded into the published "
        "weights.",
    )
    new_tokens: Annotated[list[NewToken], Field(max_length=64)] = Field(
        [],
        description="Tokens that the model is to learn, such as <|ticket|> (docs/newtokens.md). Their rows of "
        "embedding and output head are trained too.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    cel_rules = (
        CelRule(
            rule="self.r < 1 || self.alpha <= 16 * self.r",
            message="alpha may be at most 16 times r: a larger scale diverges",
            field_path=".alpha",
        ),
        CelRule(
            rule="!('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            message="all-linear stands for every linear layer, so it must be the only entry of targetModules",
            field_path=".targetModules",
        ),
        _module_names("rankPattern"),
        _module_names("alphaPattern"),
    )

    @property
    def published_rank(self) -> int:
        """The one rank of the published adapter: the largest that is asked for, and at least one for each new token."""
        return max([self.r, *self.rank_pattern.values(), len(self.new_tokens)])


class Quantization(ApiModel):
    """How the frozen base weights are held (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

    type: QuantizationType = Field(
        "nf4",
        description="nf4: 4-bit NormalFloat through bitsandbytes. int8: LLM.int8() (arXiv:2208.07339). none: the "
        "compute dtype.",
    )
    double_quant: bool = Field(
        default=True, description="Quantize the quantization constants too: 0.37 bits less a weight."
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Type of the matrix products. auto: bfloat16 on GPUs, float32 on CPUs."
    )


class DPO(ApiModel):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290). The reference is the base model."""

    beta: float = Field(0.1, gt=0.0, le=10.0, description="How strongly the model is held to the reference (0 to 10).")
    loss: DPOLoss = Field(
        "sigmoid",
        description="sigmoid: the DPO paper. ipo: arXiv:2310.12036, means over tokens. hinge: SLiC, arXiv:2305.10425.",
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, le=0.49, description="Share of pairs (0 to 0.49) that is taken to be the wrong way round."
    )


class Training(ApiModel):
    """The optimization. AdamW with the usual betas 0.9 and 0.999."""

    objective: Literal["sft", "dpo"] = Field(
        "sft", description="sft: learn to write the records. dpo: learn to prefer chosen to rejected answers."
    )
    dpo: DPO | None = Field(None, description="Settings of objective dpo.")

    epochs: float | None = Field(
        None, gt=0.0, le=1000.0, description="Passes over the training records. Exactly one of epochs and maxSteps."
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="Optimizer steps. Exactly one of epochs and maxSteps.",
        json_schema_extra=_AS_INTEGER,
    )
    learning_rate: float = Field(2e-4, gt=0.0, le=0.1, description="Peak learning rate.")
    global_batch_size: int = Field(
        16,
        ge=1,
        le=MAX_GLOBAL_BATCH_SIZE,
        description="Sequences (with objective dpo: pairs) per optimizer step over all GPUs of all nodes. Gradient "
        "accumulation follows from it.",
        json_schema_extra=_AS_INTEGER,
    )
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto",
        description="Sequences (with objective dpo: pairs) per GPU in one forward pass, 1 to 1024. auto: the largest "
        "that divides globalBatchSize / processes and fits into memory.",
    )
    optimizer: Literal["adamw", "paged-adamw-8bit"] = Field(
        "adamw",
        description="adamw: fused AdamW in float32. paged-adamw-8bit: its moments in 8 bits, paged to host memory "
        "(arXiv:2110.02861); needs GPUs.",
    )
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
        CelRule(
            rule="!has(self.dpo) || self.objective == 'dpo'",
            message="dpo holds the settings of objective dpo: set objective: dpo",
            field_path=".dpo",
        ),
    )


_OUT_OF_BOUNDS = "self.nodes < 1 || self.nodes > 64 || self.gpusPerNode < 0 || self.gpusPerNode > 16"
"""A rule over several fields says nothing where one of them breaks its own bounds: those are told already."""


class Parallelism(ApiModel):
    """How many machines and processes train together, and how the weights are spread over them."""

    nodes: int = Field(1, ge=1, le=64, description="Nodes (pods) in the gang.", json_schema_extra=_AS_INTEGER)
    gpus_per_node: int = Field(
        1,
        ge=0,
        le=16,
        description="GPUs of each node, one process each. 0 trains on the CPU with one process a node.",
        json_schema_extra=_AS_INTEGER,
    )
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="ddp: each process holds the whole model. fsdp: sharded over all processes (FSDP2). hsdp: sharded "
        "inside a group, replicated across groups. auto: hsdp over nodes where one holds the model, else fsdp.",
    )
    shard_size: int | None = Field(
        None,
        ge=2,
        le=512,
        description="Processes that share one copy of the weights with hsdp. Default: those of one node.",
        json_schema_extra=_AS_INTEGER,
    )
    cpu_offload: bool = Field(
        default=False,
        description="Keep weights and optimizer in host memory between uses: much less GPU memory, much slower.",
    )
    collective_timeout_seconds: int = Field(
        600,
        ge=10,
        le=86400,
        description="Seconds that a process waits for the others in one collective operation.",
    )

    cel_rules = (
        CelRule(
            rule=f"{_OUT_OF_BOUNDS} || self.nodes * self.gpusPerNode <= 512",
            message="nodes * gpusPerNode may be at most 512",
            field_path=".nodes",
        ),
        CelRule(
            rule="!self.cpuOffload || self.strategy != 'ddp'",
            message="cpuOffload needs sharded weights: set strategy to fsdp, hsdp or auto",
            field_path=".cpuOffload",
        ),
        CelRule(
            rule="!has(self.shardSize) || self.strategy == 'hsdp'",
            message="shardSize belongs to strategy hsdp",
            field_path=".shardSize",
        ),
        CelRule(
            rule=f"!has(self.shardSize) || self.shardSize < 2 || {_OUT_OF_BOUNDS} || "
            "self.nodes * (self.gpusPerNode > 0 ? self.gpusPerNode : 1) % self.shardSize == 0",
            message="shardSize must divide nodes * max(gpusPerNode, 1)",
            field_path=".shardSize",
        ),
        CelRule(
            rule=f"self.strategy != 'hsdp' || has(self.shardSize) || {_OUT_OF_BOUNDS} || (self.nodes > 1 && "
            f"self.gpusPerNode > 1)",
            message="hsdp needs more than one node with more than one GPU each, or shardSize",
            field_path=".strategy",
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

    every_steps: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="Save one every so many optimizer steps. Default, unless everyMinutes is set: that of the runtime, "
        "else 100.",
    )
    every_minutes: int | None = Field(
        None, ge=1, le=10_080, description="Save one every so many minutes. With everySteps: whichever is due."
    )
    keep: int | None = Field(
        None,
        ge=1,
        le=20,
        description="Complete checkpoints to keep; older ones are deleted. Default: that of the runtime, else 2.",
    )
    retain_hours: int | None = Field(
        None,
        ge=1,
        le=87_600,
        description="Hours that they are kept once the run has failed or is deleted. Default: that of the runtime, "
        "else 168.",
    )

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints; ``None`` where minutes alone say when."""
        return 100 if self.every_steps is None and self.every_minutes is None else self.every_steps

    @property
    def kept(self) -> int:
        """Complete checkpoints to keep."""
        return 2 if self.keep is None else self.keep

    @property
    def retained_hours(self) -> int:
        """Hours that checkpoints are kept after the run has failed or was deleted."""
        return 168 if self.retain_hours is None else self.retain_hours


_ONE_ORIGIN = "set exactly one of name and uri"


class ResumeFrom(ApiModel):
    """The checkpoint of another run."""

    name: LabelName | None = Field(
        None,
        description="publish.name, else the name, of a LoRAFineTune of this namespace and store. It may be gone.",
    )
    uri: StoreUri | None = Field(
        None,
        description="s3://BUCKET/PREFIX of a checkpoint (step-N), or of several: the newest. Below NAMESPACE of the "
        "store, or of a prefix in limits.storePrefixes.",
    )

    cel_rules = (
        CelRule(rule="has(self.name) != has(self.uri)", message=_ONE_ORIGIN, field_path=".name"),
        *store_rules("uri"),
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.name is None) == (self.uri is None):
            raise ValueError(_ONE_ORIGIN)
        return self


class RunCheckpoint(Checkpoint):
    """What a run goes on from. Checkpoints go to the store and are deleted when the adapter is published."""

    resume_from: ResumeFrom | None = Field(
        None,
        description="What the first attempt goes on from: a checkpoint of another run of the same shape "
        "(docs/checkpoints.md).",
    )
