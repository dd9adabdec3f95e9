"""The LoRAFineTune resource: what a user asks for.

Every bound, default and description here becomes the CRD (``make generate``) and the API reference. A field exists
only once the trainer or the operator acts on it.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from lora_api._base import ApiModel, CelRule
from lora_api.status import LoRAFineTuneStatus

GROUP = "lorafinetune.io"
VERSION = "v1alpha1"
KIND: Literal["LoRAFineTune"] = "LoRAFineTune"
PLURAL = "lorafinetunes"
API_VERSION: Literal["lorafinetune.io/v1alpha1"] = "lorafinetune.io/v1alpha1"

MAX_NAME_LENGTH = 52
"""Longest name of a run: its pods are called ``<name>-<attempt>-<index>`` and a host name has at most 63 characters."""

MAX_GLOBAL_BATCH_SIZE = 65536

# Printable ASCII only: Python, Rust and Go disagree on what else is white space.
ModelUri = Annotated[str, StringConstraints(pattern=r"^(hf|s3|pvc|file)://[!-~]+$", max_length=512)]
DataUri = Annotated[str, StringConstraints(pattern=r"^(hf|s3|pvc|file)://[!-~]+$", max_length=512)]
StoreUri = Annotated[str, StringConstraints(pattern=r"^(s3|file)://[!-~]+$", max_length=512)]
ObjectName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)
]
LabelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Quantity = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$", min_length=1, max_length=32),
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]
QUALIFIED_NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
"""Key of a label or a taint: NAME or DOMAIN/NAME."""
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+$", min_length=1, max_length=128)]


_HUB_URI = "hf://[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"
_BUCKET_URI = "s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/.*)?"
_CLAIM_URI = "pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/.*)?"

# A cluster has no use for file://, which the models take for runs outside of one. The pattern of the schema has no
# words of its own; this rule says what is wanted.
_SOURCE_FORM = CelRule(
    rule=f"self.uri.matches('^({_HUB_URI}|{_BUCKET_URI}|{_CLAIM_URI})$')",
    message="uri must be hf://ORG/NAME, s3://BUCKET/PATH or pvc://CLAIM/PATH",
    field_path=".uri",
)
_SOURCE_STAYS_INSIDE = CelRule(
    rule="!self.uri.matches('/[.][.]?(/|$)')",
    message="the path of uri may not have . or .. as one of its parts",
    field_path=".uri",
)


_REVISION_NEEDS_HUB = CelRule(
    rule="!has(self.revision) || self.uri.startsWith('hf://')",
    message="revision names a commit, branch or tag of a model hub, so it needs a uri that starts with hf://",
    field_path=".revision",
)


class BaseModelSource(ApiModel):
    """The model that the adapter is trained on."""

    uri: ModelUri = Field(
        description="Where the base model is: hf://ORG/NAME, s3://BUCKET/PATH or pvc://CLAIM/PATH. A directory in "
        "Hugging Face layout: config.json, tokenizer files and *.safetensors."
    )
    revision: ShortText | None = Field(
        None, description="Commit, branch or tag on the model hub. Only with hf://. Default: the hub's main branch."
    )

    cel_rules = (_SOURCE_FORM, _SOURCE_STAYS_INSIDE, _REVISION_NEEDS_HUB)


class DataSource(ApiModel):
    """One set of records."""

    uri: DataUri = Field(
        description="Where the records are: hf://ORG/NAME, s3://BUCKET/PATH or pvc://CLAIM/PATH. PATH is a .jsonl, "
        ".json (one array), .csv or .parquet file, or a directory of such files, read in the order of their names."
    )
    revision: ShortText | None = Field(
        None, description="Commit, branch or tag on the hub. Only with hf://. Default: the hub's main branch."
    )
    split: ShortText | None = Field(None, description="Split of a hub dataset. Only with hf://. Default: train.")

    cel_rules = (
        _SOURCE_FORM,
        _SOURCE_STAYS_INSIDE,
        _REVISION_NEEDS_HUB,
        CelRule(
            rule="!has(self.split) || self.uri.startsWith('hf://')",
            message="split belongs to a hub dataset, so it needs a uri that starts with hf://",
            field_path=".split",
        ),
    )


class Dataset(ApiModel):
    """What to learn from, and what to measure with."""

    train: DataSource = Field(description="Records to train on.")
    eval: DataSource | None = Field(
        None, description="Records to evaluate on, before and after training. Not together with evalFraction."
    )
    eval_fraction: float | None = Field(
        None,
        ge=0.0,
        le=0.5,
        description="Share of the training records (0 to 0.5) held out for evaluation when eval is not given. "
        "Default: 0.05. 0 turns evaluation off.",
    )
    format: Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "text"] = Field(
        "auto",
        description="Form of a record. messages: {messages: [{role, content}]}. sharegpt: {conversations: [{from, "
        "value}]}. prompt-completion: {prompt, completion}, loss on the completion only. alpaca: {instruction, input, "
        "output}, loss on the output only. text: {text}. auto: found from the first record.",
    )
    columns: Annotated[dict[str, ShortText], Field(min_length=1, max_length=8)] | None = Field(
        None,
        description="Names of the fields in the files, by the names that the format has, such as {prompt: question, "
        "completion: answer}. Holds for train and eval. Default: the names of the format.",
    )
    system_prompt: Annotated[str, StringConstraints(min_length=1, max_length=16384)] | None = Field(
        None,
        description="System message that is put before conversations without one. Not for plain text: text, and "
        "prompt and completion that are strings.",
    )
    max_seq_length: int = Field(
        2048, ge=8, le=131072, description="Longest sequence in tokens. Longer records are cut at the end."
    )

    cel_rules = (
        CelRule(
            rule="!(has(self.eval) && has(self.evalFraction))",
            message="set either eval or evalFraction, not both",
            field_path=".evalFraction",
        ),
        CelRule(
            rule="!has(self.columns) || self.columns.all(k, k in (self.format == 'messages' ? ['messages'] : "
            "self.format == 'sharegpt' ? ['conversations'] : self.format == 'prompt-completion' ? ['prompt', "
            "'completion'] : self.format == 'alpaca' ? ['instruction', 'input', 'output'] : self.format == 'text' ? "
            "['text'] : ['messages', 'conversations', 'prompt', 'completion', 'instruction', 'input', 'output', "
            "'text']))",
            message="columns may name only the fields of the format: messages; conversations (sharegpt); prompt and "
            "completion; instruction, input and output (alpaca); text",
            field_path=".columns",
        ),
        CelRule(
            rule="!has(self.systemPrompt) || self.format != 'text'",
            message="systemPrompt needs conversations: plain text has no messages to put it before",
            field_path=".systemPrompt",
        ),
    )


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


class SecretRef(ApiModel):
    """A Secret in the namespace of the resource."""

    name: ObjectName = Field(description="Name of the Secret.")


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


def _resource_names(field: str) -> CelRule:
    return CelRule(
        rule=f"self.{field}.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || k.startsWith('hugepages-') || "
        "(k.contains('/') && !k.endsWith('.com/gpu')))",
        message=f"{field} may name cpu, memory, ephemeral-storage, hugepages-SIZE or VENDOR/RESOURCE; GPUs are asked "
        "for by parallelism.gpusPerNode",
        field_path=f".{field}",
    )


class ResourceRequirements(ApiModel):
    """Compute resources of each pod. GPUs are added from parallelism.gpusPerNode."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        {}, description="What the scheduler sets aside, such as {cpu: 8, memory: 64Gi}."
    )
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        {}, description="What a pod may use at most. A pod that passes its memory limit is ended (HostOutOfMemory)."
    )

    cel_rules = (
        _resource_names("requests"),
        _resource_names("limits"),
        CelRule(
            rule="self.requests.all(k, !(k in self.limits) || "
            "quantity(self.requests[k]).compareTo(quantity(self.limits[k])) <= 0)",
            message="requests may not be larger than limits",
            field_path=".requests",
        ),
        CelRule(
            rule="self.requests.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || "
            "(k in self.limits && self.limits[k] == self.requests[k]))",
            message="what is asked for of hugepages-SIZE or VENDOR/RESOURCE cannot be shared: it needs the same value "
            "in limits",
            field_path=".requests",
        ),
    )


class Toleration(ApiModel):
    """A taint that the pods accept (the same as in a pod)."""

    key: Annotated[str, StringConstraints(pattern=QUALIFIED_NAME, max_length=316)] | None = Field(
        None, description="Key of the taint. Absent with operator Exists: every taint."
    )
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How key and value are compared.")
    value: LabelValue | None = Field(None, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint. Default: every effect."
    )
    toleration_seconds: int | None = Field(
        None, ge=0, le=31_536_000, description="How long a NoExecute taint is accepted, in seconds. Default: for ever."
    )

    cel_rules = (
        CelRule(
            rule="self.operator == 'Exists' ? !has(self.value) : has(self.key)",
            message="operator Exists takes no value, and operator Equal needs a key",
            field_path=".operator",
        ),
        CelRule(
            rule="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            message="tolerationSeconds needs effect NoExecute",
            field_path=".tolerationSeconds",
        ),
    )


ENV_ALLOWED = r"^(NCCL|GLOO|UCX|OMP|MKL|TORCH|PYTORCH|CUDA|HF|TOKENIZERS|LORA)_[A-Z0-9_]+$"


class EnvVar(ApiModel):
    """One environment variable of the trainer."""

    name: Annotated[str, StringConstraints(pattern=ENV_ALLOWED, max_length=128)] = Field(
        description="Name: one that starts with NCCL_, GLOO_, UCX_, OMP_, MKL_, TORCH_, PYTORCH_, CUDA_, HF_, "
        "TOKENIZERS_ or LORA_."
    )
    value: Annotated[str, StringConstraints(max_length=1024)] = Field(description="Value.")

    cel_rules = (
        CelRule(
            rule="self.name != 'HF_TOKEN'",
            message="HF_TOKEN is a secret: put it into the Secret of credentials.secretRef",
            field_path=".name",
        ),
    )


LabelMap = Annotated[dict[str, LabelValue], Field(max_length=32)]
AnnotationMap = Annotated[dict[str, Annotated[str, StringConstraints(max_length=1024)]], Field(max_length=32)]


def _qualified_names(field: str) -> CelRule:
    """Refuses a key that Kubernetes would refuse in the pod."""
    return CelRule(
        rule=f"self.{field}.all(k, size(k) <= 316 && k.matches('{QUALIFIED_NAME}'))",
        message=f"a key of {field} must be NAME or DOMAIN/NAME, with at most 63 letters, digits, '-', '_' and '.' in "
        "NAME",
        field_path=f".{field}",
    )


class PodTemplate(ApiModel):
    """What the pods of the gang get. Security settings, volumes and the image are not the user's to choose."""

    resources: ResourceRequirements = Field(
        default_factory=ResourceRequirements, description="CPU, memory and other resources of each pod."
    )
    node_selector: LabelMap = Field({}, description="Labels that a node must have.")
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(
        [], description="Taints that the pods accept.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] = Field(
        [],
        description="Settings of the libraries, such as NCCL_SOCKET_IFNAME. Secrets belong into credentials.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    image_pull_secrets: Annotated[list[SecretRef], Field(max_length=8)] = Field(
        [],
        description="Secrets for the registry of the trainer's image.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    labels: LabelMap = Field({}, description="Labels added to the pods. Keys of this operator cannot be set.")
    annotations: AnnotationMap = Field({}, description="Annotations added to the pods.")

    cel_rules = (
        _qualified_names("nodeSelector"),
        _qualified_names("labels"),
        _qualified_names("annotations"),
        CelRule(
            rule="self.labels.all(k, !k.contains('lorafinetune.io/') && !k.contains('batch.kubernetes.io/'))",
            message="labels with lorafinetune.io/ or batch.kubernetes.io/ belong to the operator",
            field_path=".labels",
        ),
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
