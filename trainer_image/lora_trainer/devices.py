"""What the trainer decides by the kind of a device: types, copies and process groups, all of it here. Pure.

What needs a device itself is not: how much memory it has, which kernels it runs, and which of them is this process's.
"""

from dataclasses import dataclass

import torch

from lora_trainer.errors import BadSpecError, GPUUnsupportedError


@dataclass(frozen=True)
class Backends:
    """What processes talk through (``groups``).

    Attributes:
        device: backend of the group of all processes, of which every mesh is made. One backend and no more.
        host: backend of the second group, for tensors in host memory; ``None``: the first one takes them.
        bound: the first group belongs to this process's device, so that a mesh's groups are split off from it.
    """

    device: str
    host: str | None = None
    bound: bool = False


@dataclass(frozen=True)
class Traits:
    """What a kind of device decides.

    Attributes:
        products: type of the matrix products where quantization.computeDtype is auto.
        bfloat16: whether its products may be in bfloat16, and the forward pass under autocast.
        fused_optimizer: one kernel for all of AdamW.
        prefetch: the next step's micro-batches are made by a thread while this step computes.
        pinned_memory: host memory is page-locked for copies.
        accelerate_cpu: transformers and accelerate are told to leave GPUs alone.
        backends: of the process groups.
    """

    products: torch.dtype
    bfloat16: bool
    fused_optimizer: bool
    prefetch: bool
    pinned_memory: bool
    accelerate_cpu: bool
    backends: Backends


GPU = Traits(
    products=torch.bfloat16,
    bfloat16=True,
    fused_optimizer=True,
    prefetch=True,
    pinned_memory=True,
    accelerate_cpu=False,
    backends=Backends("nccl", host="gloo", bound=True),
)
CPU = Traits(
    products=torch.float32,
    bfloat16=False,
    fused_optimizer=False,
    prefetch=False,
    pinned_memory=False,
    accelerate_cpu=True,
    backends=Backends("gloo"),
)
TRAITS = {"cuda": GPU, "cpu": CPU}
"""By torch's name of the kind of device."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""By the names of quantization.computeDtype."""

BFLOAT16_CAPABILITY = (8, 0)
"""The least compute capability with products in bfloat16: Ampere (also in transformers 5.23, training_args.py:1781)."""


def traits(device: torch.device) -> Traits:
    """What the kind of ``device`` decides."""
    return TRAITS[device.type]


def product_type(compute_dtype: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products for ``quantization.computeDtype``.

    Raises:
        BadSpecError: bfloat16 on a CPU, where its products are slow, and wrong on some.
    """
    kind = traits(device)
    if compute_dtype == "auto":
        return kind.products
    if compute_dtype == "bfloat16" and not kind.bfloat16:
        raise BadSpecError("quantization.computeDtype bfloat16 needs GPUs (parallelism.gpusPerNode above 0)")
    return DTYPES[compute_dtype]


def check_bfloat16(compute_dtype: str, gpu: str, capability: tuple[int, int]) -> None:
    """Refuses a ``gpu`` (its name) that can only imitate bfloat16, which torch does without a word (2.13).

    Raises:
        GPUUnsupportedError: the run computes in bfloat16, and the GPU's compute capability is too low.
    """
    if compute_dtype != "float32" and capability < BFLOAT16_CAPABILITY:
        have, need = (".".join(map(str, one)) for one in (capability, BFLOAT16_CAPABILITY))
        raise GPUUnsupportedError(
            f"{gpu} has compute capability {have}, and bfloat16 needs {need} (Ampere) or more: choose other GPUs with "
            "nodeSelector in podTemplate or in the runtime, or set quantization.computeDtype to float32"
        )
