"""A fine-tune as far as its memory goes: the model's shape, how it is trained, and the program that trains it."""

from dataclasses import dataclass
from functools import cached_property

from lora_api.training import LoRA, Quantization
from lora_trainer.modelshape import Linear, ModelShape, Weights

SAFETY_GIB = 1.5
"""What the safe figure adds for libraries' workspaces, fragmentation and longer steps than the first ones."""


@dataclass(frozen=True)
class Stack:
    """What the training program does with memory. The defaults are this trainer on GPUs.

    Attributes:
        logits_bytes: bytes per token and word of the vocabulary at the peak of the loss. Cross-entropy on whole logits
            holds three float32 arrays in its backward pass: log-probabilities, the gradient of the picked ones, and
            the gradient of the logits: 12. Added to it is what the program still holds of the logits themselves: 2
            in bfloat16 (transformers 4.48: 14), 4 in float32 (transformers up to 4.44 in a loop that keeps the
            model's output: 16). A chunk of Liger's fused loss takes at most 6. A chunk of this trainer's takes 8: its
            logits in the compute type and in float32, and their gradient (``loss.TokenLosses``).
        loss_chunk: tokens whose logits exist together; ``None``: all of them. 2048 is on the safe side for Liger's.
        chunk_bytes: bytes of the float32 logits that exist together, in place of ``loss_chunk`` (``loss.CHUNK_BYTES``).
        kept_logits_bytes: bytes per token and word that stay until the backward pass is over, because the training
            loop holds the model's output. They are part of ``logits_bytes`` too.
        fused_norms: the RMSNorm kernel keeps its input in the compute type. Otherwise it keeps a float32 copy.
        residual_bytes: bytes of a value between layers; ``None``: c. It is 4 after PEFT's
            ``prepare_model_for_kbit_training``, which this trainer does not call.
        adapter_bytes: bytes per trainable weight without the optimizer: 8 for a float32 weight and its gradient, 4 when
            they are bfloat16.
        moment_bytes: bytes of one of AdamW's two moments.
        fsdp1: sharded by FSDP 1, under which one more value between layers is held per token and layer in the backward
            pass. The cause is not known here, the size is: in a100_80gb_liger.csv of fms-acceleration a token of
            Llama-3-8B takes 520 kB on one GPU and 766 kB on two; (L - 1) c h is 254 kB. This trainer uses FSDP 2.
        loads_whole: each GPU holds the whole model before it is sharded. This trainer cuts each weight while it loads
            (``loading.keeping``).
        context_gib: CUDA context and cuBLAS workspaces, which torch does not count.
        collectives_gib: NCCL's buffers, with more than one GPU.
        padding_mask: padded batches of several sequences, and packed ones, have a mask of c + 1 bytes for each pair of
            positions. Not so with FlashAttention.
        safety_gib: what the safe figure adds.
        host: the memory is that of the machine: the run trains on CPUs.
    """

    logits_bytes: int = 8
    loss_chunk: int | None = None
    chunk_bytes: int | None = 256 * 2**20
    kept_logits_bytes: int = 0
    fused_norms: bool = False
    residual_bytes: int | None = None
    adapter_bytes: int = 8
    moment_bytes: int = 4
    fsdp1: bool = False
    loads_whole: bool = False
    context_gib: float = 0.5
    collectives_gib: float = 0.5
    padding_mask: bool = True
    safety_gib: float = SAFETY_GIB
    host: bool = False


TRAINER = Stack()

CPU = Stack(host=True, context_gib=0.0, collectives_gib=0.1, safety_gib=0.5)
"""This trainer on CPUs: no context, and less room to leave. What the process has before it loads is not in the plan."""


@dataclass(frozen=True)
class Job:
    """A fine-tune as far as memory goes: ``micro_batch`` sequences of ``sequence`` tokens on each GPU at a time.

    Attributes:
        world_size: training processes in all, one a GPU.
        shard_size: processes that share one copy of the weights: ``None``: all of them (fsdp); 1: ddp; a group's: hsdp.
        cpu_offload: weights, adapter and optimizer live in host memory (FSDP's CPU offload).
        objective: sft or dpo.
        optimizer: adamw or paged-adamw-8bit.
        packed: sequences are filled with several records, which a mask keeps apart.
        counted: weights as the headers of the model's files say; they win over ``shape``.
    """

    shape: ModelShape
    lora: LoRA
    quantization: Quantization
    micro_batch: int
    sequence: int
    world_size: int = 1
    gradient_checkpointing: bool = True
    stack: Stack = TRAINER
    shard_size: int | None = None
    cpu_offload: bool = False
    objective: str = "sft"
    optimizer: str = "adamw"
    packed: bool = False
    counted: Weights | None = None

    @property
    def rows(self) -> int:
        """Sequences that go through the model at a time. A preference pair is two: chosen and rejected."""
        return self.micro_batch * (2 if self.objective == "dpo" else 1)

    @property
    def tokens(self) -> int:
        """T, padding included."""
        return self.rows * self.sequence

    @property
    def shards(self) -> int:
        """S: processes that share one copy of the weights; 1 where each has all of them (ddp)."""
        return min(self.shard_size or self.world_size, self.world_size)

    @property
    def is_gathered(self) -> bool:
        """Whether layers are put together for their use, from other GPUs or from host memory."""
        return self.shards > 1 or self.cpu_offload

    @property
    def weights(self) -> Weights:
        """The base model's weights: as its files say where they were looked at, else as its configuration says."""
        return self.counted or self.shape.weights

    @property
    def compute_bytes(self) -> int:
        """Bytes of the compute type: c."""
        return 4 if self.quantization.compute_dtype == "float32" else 2

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are held in fewer bits than they compute with."""
        return self.quantization.type != "none"

    @property
    def linear_weight_bytes(self) -> float:
        """Bytes of one weight of a linear layer: two NF4 weights share a byte (QLoRA, arXiv:2305.14314)."""
        return {"nf4": 0.5, "int8": 1.0}.get(self.quantization.type, float(self.compute_bytes))

    @property
    def expert_weight_bytes(self) -> float:
        """Bytes of one weight of a routed expert: half of one in NF4, else c (``experts.pack_parameter``)."""
        return self.linear_weight_bytes if self.quantization.type == "nf4" else float(self.compute_bytes)

    @cached_property
    def targets(self) -> tuple[Linear, ...]:
        """Linear layers of one transformer layer that get an adapter."""
        return self.shape.targets(self.lora.target_modules)
