"""Measurements of GPU memory that others have published, with the settings that each was made with.

The settings are those of the programs that were measured, not fitted point by point. ``EXTRA`` are more rows of the
same tables: without quantization, and sharded with long batches, where wrong terms show.

FMS: foundation-model-stack/fms-acceleration, scripts/benchmarks/refs, one or two A100 80 GB, sequences of 4096 tokens,
LoRA r = 16 with dropout 0.1 on q, k, v and o_proj, gradient checkpointing, bfloat16 with float32 adapters, flash
attention. The figures are ``peak_torch_mem_alloc``: allocated memory, without context and without the allocator's
reserve. ``a100_80gb_update_cross_entropy_and_deps.csv`` (transformers 4.48, torch 2.4) has accelerated-peft-bnb,
without ``prepare_model_for_kbit_training``; ``a100_80gb_liger.csv`` has the fused kernels of foak and Liger.
ANSWER.AI: AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md: two 3090, peak of reserved memory. Its train.py: LoRA r = 64
with dropout 0.1 on q, k, v, gate, up and down_proj, the model's output kept until after the backward pass, with its
logits in float32; adapter, gradient and both moments in bfloat16.
SCHMID: philschmid.de/fsdp-qlora-llama3: four A10G, 22 GB each, FSDP with CPU offload, read from the device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lora_api.training import LoRA, Quantization
from lora_trainer.job import Job, Stack
from lora_trainer.memory import MemoryPlan, plan_memory
from lora_trainer.modelshape import read_shape


def config(
    model_type: str, layers: int, hidden: int, feed_forward: int, kv_heads: int, words: int
) -> dict[str, object]:
    """A config.json with heads of 128."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "tie_word_embeddings": False,
    }


MISTRAL_7B = config("mistral", 32, 4096, 14336, 8, 32000)
LLAMA_2_7B = config("llama", 32, 4096, 11008, 32, 32000)
LLAMA_2_70B = config("llama", 80, 8192, 28672, 8, 32000)
LLAMA_3_8B = config("llama", 32, 4096, 14336, 8, 128256)
LLAMA_3_70B = config("llama", 80, 8192, 28672, 8, 128256)

ATTENTION = LoRA(r=16, alpha=16, dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
ANSWER_TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
ANSWER = LoRA(r=64, alpha=16, dropout=0.1, target_modules=ANSWER_TARGETS)
SCHMID = LoRA(r=16, alpha=8, dropout=0.05, target_modules=["all-linear"])

# All of them used FSDP 1, and loaded without the whole model on each GPU or measured later.
WHOLE = Stack(logits_bytes=14, chunk_bytes=None, fsdp1=True, loads_whole=False, padding_mask=False)
LIGER = replace(WHOLE, logits_bytes=6, loss_chunk=2048, fused_norms=True)
ANSWER_STACK = replace(WHOLE, logits_bytes=16, kept_logits_bytes=4, adapter_bytes=4, moment_bytes=2)


def allocated(plan: MemoryPlan) -> float:
    return plan.allocated


def reserved(plan: MemoryPlan) -> float:
    return plan.reserved


def on_device(plan: MemoryPlan) -> float:
    return plan.on_device


@dataclass(frozen=True)
class Published:
    """One measurement, in GiB. ``batch`` x ``sequence`` tokens on each of ``gpus`` GPUs."""

    name: str
    measured: float
    measure: Callable[[MemoryPlan], float]
    model: Mapping[str, object]
    lora: LoRA
    stack: Stack
    gpus: int
    batch: int
    sequence: int = 4096
    quantization: Quantization = field(default_factory=Quantization)
    cpu_offload: bool = False

    def job(self) -> Job:
        shape = read_shape(self.model)
        return Job(
            shape,
            self.lora,
            self.quantization,
            self.batch,
            self.sequence,
            self.gpus,
            stack=self.stack,
            cpu_offload=self.cpu_offload,
        )

    @property
    def planned(self) -> float:
        return self.measure(plan_memory(self.job()))

    @property
    def error(self) -> float:
        """Of the plan, as a share of the measurement."""
        return self.planned / self.measured - 1

    def to_row(self) -> str:
        """Row of the table in docs/memory.md."""
        kind = self.measure.__name__.replace("_", " ")
        size = f"{self.batch} x {self.sequence}"
        return (
            f"| {self.name} | {self.gpus} | {size} | {kind} | {self.measured:.2f} | {self.planned:.2f} "
            f"| {100 * self.error:+.1f}% |"
        )


NONE = Quantization(type="none")

POINTS = (
    Published("Mistral-7B", 15.25, allocated, MISTRAL_7B, ATTENTION, WHOLE, 1, 4),
    Published("Mistral-7B", 26.46, allocated, MISTRAL_7B, ATTENTION, WHOLE, 1, 8),
    Published("Mistral-7B", 8.78, allocated, MISTRAL_7B, ATTENTION, WHOLE, 2, 2),
    Published("Llama-2-70B", 63.45, allocated, LLAMA_2_70B, ATTENTION, WHOLE, 1, 4),
    Published("Llama-2-7B, fsdp_qlora", 5.21, reserved, LLAMA_2_7B, ANSWER, ANSWER_STACK, 2, 1, 2048),
    Published("Llama-2-7B, fsdp_qlora", 11.22, reserved, LLAMA_2_7B, ANSWER, ANSWER_STACK, 2, 4, 2048),
    Published("Llama-2-7B, fsdp_qlora", 20.97, reserved, LLAMA_2_7B, ANSWER, ANSWER_STACK, 2, 10, 2048),
    Published("Llama-3-70B, CPU offload", 20.5, on_device, LLAMA_3_70B, SCHMID, WHOLE, 4, 1, 3072, cpu_offload=True),
    Published("Llama-3-8B, Liger", 13.42, allocated, LLAMA_3_8B, ATTENTION, LIGER, 1, 4),
    Published("Llama-3-8B, Liger", 21.36, allocated, LLAMA_3_8B, ATTENTION, LIGER, 1, 8),
    Published("Llama-3-8B, Liger", 37.24, allocated, LLAMA_3_8B, ATTENTION, LIGER, 1, 16),
    Published("Llama-3-8B, Liger", 69.0, allocated, LLAMA_3_8B, ATTENTION, LIGER, 1, 32),
)

EXTRA = (
    Published("Mistral-7B", 14.87, allocated, MISTRAL_7B, ATTENTION, WHOLE, 2, 4),
    Published("Llama-2-70B", 43.48, allocated, LLAMA_2_70B, ATTENTION, WHOLE, 2, 2),
    Published("Mistral-7B, bf16", 24.87, allocated, MISTRAL_7B, ATTENTION, WHOLE, 1, 4, quantization=NONE),
    Published("Mistral-7B, bf16", 36.08, allocated, MISTRAL_7B, ATTENTION, WHOLE, 1, 8, quantization=NONE),
    Published("Mistral-7B, bf16", 14.1, allocated, MISTRAL_7B, ATTENTION, WHOLE, 2, 2, quantization=NONE),
    Published("Llama-3-8B, Liger, bf16", 23.2, allocated, LLAMA_3_8B, ATTENTION, LIGER, 1, 4, quantization=NONE),
    Published("Llama-3-8B, Liger, bf16", 47.4, allocated, LLAMA_3_8B, ATTENTION, LIGER, 1, 16, quantization=NONE),
    Published("Llama-3-8B, Liger", 16.62, allocated, LLAMA_3_8B, ATTENTION, LIGER, 2, 4),
    Published("Llama-3-8B, Liger", 51.69, allocated, LLAMA_3_8B, ATTENTION, LIGER, 2, 16),
    Published("Llama-3-8B, Liger", 50.39, allocated, LLAMA_3_8B, ATTENTION, LIGER, 4, 16),
)
