"""How much GPU memory a run needs, by part, before anything is loaded. Pure arithmetic; no torch.

A training step has two moments of high memory, and they do not come together: the loss, when the logits and their
gradient are there, and the backward pass through one layer, when that layer's inner values are recomputed. What is
held between them (weights, adapter, one saved input a layer) is needed at both. So the peak is

    weights + constants + gathered + adapter + held + max(one layer, loss) + context

and never the sum of layer and loss. ``docs/memory.md`` compares it with published measurements.

Letters: T tokens of a micro-batch on one GPU, S GPUs that share one copy of the weights (all with fsdp, a group with
hsdp, 1 with ddp), L layers, h hidden size, q and kv width of all query and of all key heads, f inner width of the MLP,
V vocabulary, r rank, c bytes of the compute type (2 for bfloat16, 4 for float32). All functions give bytes; GiB (2**30
bytes) are made at the end.
"""

import dataclasses
from dataclasses import dataclass

from lora_trainer.job import SAFETY_GIB, Job

GIB = 2**30

ALLOCATOR_FACTOR = 1.10
"""Memory that torch reserves over what is allocated at the peak.

fms-acceleration, a100_80gb_liger.csv, Llama-3-8B NF4: allocated 13.42, 21.36, 37.24 and 69.00 GiB, on the device 15.16,
23.79, 41.42 and 76.67 GiB: 1.10 times as much, and 0.4 to 0.8 GiB.
"""


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory of one GPU in GiB, by part. Parts are at least 0 and add up to ``total``.

    ``activations`` is what is held from forward to backward, and one layer's inner values. ``logits`` is by how much
    the loss needs more than that layer together with its dequantized weight, and ``loading`` by how much loading
    needs more than training: both are often 0. ``safety`` is no part: it is the room that ``safe`` leaves.
    """

    weights_sharded: float
    weights_replicated: float
    gathered_layers: float
    lora_and_optimizer: float
    activations: float
    logits: float
    dequantization: float
    context: float
    loading: float
    safety: float = SAFETY_GIB

    def parts(self) -> dict[str, float]:
        """The parts under their names in JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "safety"]
        return {_camel(name): getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        """Estimate of the peak, in GiB."""
        return sum(self.parts().values())

    @property
    def safe(self) -> float:
        """Device memory that a run needs to be safe from running out of it, in GiB: estimate x 1.10 + 1.5."""
        return self.total * ALLOCATOR_FACTOR + self.safety

    def fits(self, device_gib: float) -> bool:
        """Whether ``device_gib`` GiB per GPU are enough: exactly ``safe <= device_gib``."""
        return self.safe <= device_gib

    @property
    def allocated(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` will say, in GiB: everything but the context."""
        return self.total - self.context

    @property
    def reserved(self) -> float:
        """What ``torch.cuda.max_memory_reserved`` will say, in GiB."""
        return self.allocated * ALLOCATOR_FACTOR

    @property
    def on_device(self) -> float:
        """What ``nvidia-smi`` will say, in GiB."""
        return self.reserved + self.context


def plan_memory(job: Job) -> MemoryPlan:
    """The plan for ``job``.

    Raises:
        BadSpecError: a target module is not in the model.
    """
    stack, shards = job.stack, job.shards
    on_gpu = 0 if job.cpu_offload else 1
    weights = on_gpu * weight_bytes(job) / shards
    adapter = on_gpu * adapter_bytes(job) / shards + row_bytes(job)
    constants = constant_bytes(job)
    gathered = gathered_bytes(job)
    held = held_bytes(job)
    dequantization = dequantization_bytes(job)
    layer = layer_bytes(job)
    logits = max(0.0, loss_bytes(job) - layer - dequantization)
    training = weights + constants + gathered + adapter + held + layer + dequantization + logits
    return MemoryPlan(
        weights_sharded=weights / GIB,
        weights_replicated=constants / GIB,
        gathered_layers=gathered / GIB,
        lora_and_optimizer=adapter / GIB,
        activations=(held + layer) / GIB,
        logits=logits / GIB,
        dequantization=dequantization / GIB,
        context=stack.context_gib + (stack.collectives_gib if job.world_size > 1 else 0.0),
        loading=max(0.0, loading_bytes(job) - training) / GIB,
        safety=stack.safety_gib,
    )


def linear_bytes(job: Job) -> float:
    """Bytes of the linear layers of one transformer layer, its experts and router: 0.5 (2hq + 2h kv + 3hf) in NF4.

    1 byte a weight in int8 (LLM.int8(), arXiv:2208.07339), c without quantization. Experts have 0.5 in NF4, else c.
    """
    shape = job.shape
    experts = job.expert_weight_bytes * shape.expert_weights + job.compute_bytes * shape.router_weights
    return job.linear_weight_bytes * shape.layer_weights + experts


def weight_bytes(job: Job) -> float:
    """Bytes of one copy of the base model: linear layers and experts as they are quantized, all else in c bytes."""
    weights = job.weights
    quantized = job.linear_weight_bytes * weights.linear + job.expert_weight_bytes * weights.experts
    return quantized + job.compute_bytes * weights.rest


def constant_bytes(job: Job) -> float:
    """Bytes of the quantization constants, whole on every GPU: FSDP shards parameters, and these are none.

    NF4: one float32 a block of 64 weights: 0.5 bit a weight. Quantized a second time, in blocks of 256:
    8/64 + 32/(64 x 256) = 0.127 bit (QLoRA, section 3). int8: one float32 an output of each linear layer.
    """
    if job.quantization.type == "int8":
        return 4.0 * job.shape.layers * sum(linear.outputs for linear in job.shape.linears)
    if job.quantization.type == "none":
        return 0.0
    bits = 8 / 64 + 32 / (64 * 256) if job.quantization.double_quant else 32 / 64
    return (job.weights.linear + job.weights.experts) * bits / 8


def gathered_bytes(job: Job) -> float:
    """Bytes of what FSDP has whole at a time: embedding and output head, this layer and the next: 0 with ddp.

    The root group is not put back to shards between forward and backward pass; the next layer is prefetched.
    """
    if not job.is_gathered:
        return 0.0
    return job.compute_bytes * job.shape.embedding_weights + 2 * linear_bytes(job)


def adapter_bytes(job: Job) -> float:
    """Bytes of one copy of adapter, gradient and optimizer: 16 for each trainable weight in float32.

    8-bit AdamW has moments of 1 byte, and a float32 scale for each 256 of them (arXiv:2110.02861). That it is paged
    saves nothing here: pages leave the GPU only when it is full. ddp holds the gradient twice, the second time in the
    buckets that are reduced.
    """
    stack = job.stack
    moment = 1 + 4 / 256 if job.optimizer == "paged-adamw-8bit" else stack.moment_bytes
    buckets = stack.adapter_bytes / 2 if job.shards == 1 and job.world_size > 1 else 0
    return adapter_weights(job) * (stack.adapter_bytes + 2 * moment + buckets)


def row_bytes(job: Job) -> float:
    """Bytes of the rows of ``lora.newTokens``, whole on every process, with gradient and AdamW's moments in float32."""
    return float(16 * len(job.lora.new_tokens) * job.shape.hidden * (1 if job.shape.tied else 2))


def adapter_weights(job: Job) -> int:
    """Trainable weights: the sum of r (inputs + outputs) over the targets of all layers (LoRA, arXiv:2106.09685).

    Each with its own rank: as in PEFT, that of the first key of ``rankPattern`` which means it.
    """
    pattern = job.lora.rank_pattern.items()
    return sum(
        next((rank for target, rank in pattern if linear.is_named(target, layer)), job.lora.r)
        * (linear.inputs + linear.outputs)
        for layer in range(job.shape.layers)
        for linear in job.targets
    )


def saved_bytes(job: Job) -> float:
    """Bytes that one layer saves for its backward pass, without gradient checkpointing.

    T times: each norm its input (4 bytes, c when fused); attention q, k, v and its output, 2c(q + kv), without a
    matrix of scores; each adapted linear layer its input in type c, and a mask of 1 byte with dropout; the MLP
    its gate, the gate's activation and the other branch, 3cf. Frozen linear layers save nothing: the gradient of
    their input needs their weight alone; only bitsandbytes' int8 ones keep their input (0.50, MatMul8bitLt). Each
    chosen expert has an MLP's values and its input and output, 2ch. Eager attention saves its scores three times,
    capped, as probabilities in float32, and in type c.
    """
    shape, c = job.shape, job.compute_bytes
    norms = shape.norm_width * (c if job.stack.fused_norms else 4)
    attention = 2 * c * (shape.attention_width + shape.kv_width)
    keeping = shape.linears if job.quantization.type == "int8" else job.targets
    adapters = sum(linear.inputs for linear in keeping) * c
    adapters += sum(linear.inputs for linear in job.targets) * (1 if job.lora.dropout > 0 else 0)
    mlp = 3 * c * shape.mlp_width
    routed = shape.experts_per_token * 2 * c * shape.hidden if shape.experts > 1 else 0
    scores = shape.heads * job.sequence * (2 * c + 4) if shape.family.eager else 0
    return float(job.tokens * (norms + attention + adapters + mlp + routed + scores))


def held_bytes(job: Job) -> float:
    """Bytes held from forward to backward pass: with gradient checkpointing T L h b, else all that layers save.

    b is the size of a value between layers. Checkpointing: Chen et al., arXiv:1604.06174, one checkpoint a layer.
    """
    shape = job.shape
    if not job.gradient_checkpointing:
        return shape.layers * saved_bytes(job) + mask_bytes(job)
    between = shape.layers * shape.hidden * (job.stack.residual_bytes or job.compute_bytes)
    return float(job.tokens * between) + mask_bytes(job)


def mask_bytes(job: Job) -> float:
    """Bytes of the mask of padded rows, one byte and a value of type c for each pair of positions.

    A row alone has no padding. torch's SDPA makes the values from the bytes; FlashAttention needs neither. Nor do
    packed rows that have a kernel (``varlen``), but which GPU it will be is not known here, so they count all the same.
    """
    if not job.stack.padding_mask or (job.rows == 1 and not job.packed):
        return 0.0
    return float(job.tokens * job.sequence * (1 + job.compute_bytes))


def layer_bytes(job: Job) -> float:
    """Bytes of one layer's backward pass: T(3cf + ch) for gradients, and what it saves if that is recomputed.

    In the MLP the gradients of the product and of its two factors are there at a time. ``Stack.kept_logits_bytes`` and
    ``Stack.fsdp1`` add to it.
    """
    shape, c, stack = job.shape, job.compute_bytes, job.stack
    each = c * (3 * shape.mlp_width + shape.hidden)
    each += shape.vocabulary * stack.kept_logits_bytes
    each += shape.heads * job.sequence * (c + 4) if shape.family.eager else 0
    if stack.fsdp1 and job.shards > 1:
        each += (shape.layers - 1) * c * shape.hidden
    return job.tokens * each + (saved_bytes(job) if job.gradient_checkpointing else 0.0)


def dequantization_bytes(job: Job) -> float:
    """Bytes of the largest linear layer in the compute type, which is made for each product: mostly c h f.

    Of experts in NF4 one matrix at a time is made, the largest 2hf, beside the scales of all experts of the layer, 4
    bytes for each 64 weights.
    """
    if not job.is_quantized:
        return 0.0
    shape = job.shape
    largest = job.compute_bytes * max(linear.weights for linear in shape.linears)
    if not shape.is_mixture or job.quantization.type != "nf4":
        return float(largest)
    scales = 4 * shape.expert_weights / 64
    return max(float(largest), job.compute_bytes * 2 * shape.hidden * shape.feed_forward + scales)


def loss_bytes(job: Job) -> float:
    """Bytes of the loss: k V for each token of a chunk, and 3ch a token: last value, its norm, and its gradient.

    This trainer's gradient is float32 until it is scaled: 4h in place of ch.
    """
    stack, shape, c = job.stack, job.shape, job.compute_bytes
    gradient = c if stack.chunk_bytes is None else max(c, 4)
    together = min(job.tokens, stack.loss_chunk or job.tokens)
    if stack.chunk_bytes is not None:
        together = min(together, max(64, stack.chunk_bytes // (4 * shape.vocabulary)))
    return float(together * shape.vocabulary * stack.logits_bytes + job.tokens * (2 * c + gradient) * shape.hidden)


def loading_bytes(job: Job) -> float:
    """Bytes while loading: the whole base model, its constants, and the adapter's float32 weights.

    Where each weight is cut as it comes, only a mixture's are large enough to count: the gates of a layer's experts are
    there twice in the compute type, one by one as in the files and joined, beside this GPU's share of the rest.
    """
    if job.stack.loads_whole:
        return weight_bytes(job) + constant_bytes(job) + 4 * adapter_weights(job)
    share = 0.0 if job.cpu_offload else weight_bytes(job) / job.shards
    return share + constant_bytes(job) + 2 * job.compute_bytes * job.shape.expert_weights * 2 / 3


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
