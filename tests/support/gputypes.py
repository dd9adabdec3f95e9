"""The types and the copies of a GPU, in a process that has only a CPU.

Inside ``gpu_types()`` the trainer runs as on CUDA in everything that is a type or a copy. Each function below stands
for one fact, and says where it was seen; ``bench/gpu/facts.py`` asks a real GPU for each of them, by the same name.
Kernels, their speed, memory and streams are not here.

Files are those of the versions in constraints/dev.txt; docs/decisions/035 lists what follows from these facts.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from lora_trainer import devices, servedplan, sft, varlen
from tests.support.varlen import varlen_attn

BFLOAT16_NAN = 0x7FFF
"""What CUDA makes of each bfloat16 NaN that it packs from float32."""

FLOAT32_UNDER_AUTOCAST = (
    "exp",
    "log",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "reciprocal",
    "rsqrt",
    "softplus",
    "softmax.int",
    "log_softmax.int",
    "layer_norm",
    "rms_norm",
    "logsumexp",
    "cumsum",
    "cumprod",
    "prod",
    "sum",
    "sum.dim_IntList",
    "nll_loss",
)
"""Operators that autocast runs in float32 on CUDA and not on CPUs, as far as language models use them.

torch/testing/_internal/autocast_test_lists.py:128 (torch_fp32), :213 (nn_fp32) and :233 (methods_fp32) for CUDA; the
lists for CPUs are at :340 and :353.
"""


@contextmanager
def gpu_types() -> Iterator[None]:
    """Within it, "cpu" has the types and the copies of "cuda"."""
    with ExitStack() as facts:
        for fact in FACTS.values():
            facts.enter_context(fact())
        yield


@contextmanager
def products_in_bfloat16() -> Iterator[None]:
    """The base and its products are bfloat16, the forward pass is under autocast, AdamW is fused, batches come ahead.

    lora_trainer/devices.py: the row "cuda". Page-locked memory is no type, and needs CUDA; so does NCCL, and gloo
    stands for it. There are two groups all the same. lora_trainer/servedplan.py, which has no torch, knows the types by
    ``parallelism.gpusPerNode``: 0 in the run documents of the tests, as if it were 1 here.
    """
    backends = replace(devices.GPU.backends, device="gloo", bound=False)
    served, trained = servedplan.choose_served_dtype, servedplan.trains_on
    with (
        patch.dict(devices.TRAITS, {"cpu": replace(devices.GPU, pinned_memory=False, backends=backends)}),
        patch.object(servedplan, "choose_served_dtype", lambda publish, _: served(publish, 1)),
        patch.object(servedplan, "trains_on", lambda quantization, _: trained(quantization, 1)),
    ):
        yield


@contextmanager
def packed_rows_have_a_kernel() -> Iterator[None]:
    """torch has a kernel for packed rows (torch/nn/attention/varlen.py:176), which sft.py takes: no mask, one flat row.

    Here it is the stand-in of tests/support/varlen.py, on what would be an H100.
    """
    settle = sft.settle_packing

    def settle_as_on_an_h100(model: Any, capability: Any, **rest: Any) -> None:
        settle(model, (9, 0), **rest)

    with patch.object(sft, "settle_packing", settle_as_on_an_h100), patch.object(varlen, "varlen_attn", varlen_attn):
        yield


@contextmanager
def bfloat16_is_supported() -> Iterator[None]:
    """transformers lets TrainingArguments(bf16=True) be without use_cpu: training_args.py:1778."""
    with patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True):
        yield


@contextmanager
def one_process_sees_every_gpu() -> Iterator[None]:
    """A process alone counts every GPU of its container as its own: training_args.py:1949, ``n_gpu``.

    transformers then multiplies the batch by their number (:1824) and wraps in DataParallel (trainer.py:2672). Here
    there are two.
    """
    with patch("torch.cuda.device_count", lambda: 2):
        yield


@contextmanager
def gangs_are_multi_gpu() -> Iterator[None]:
    """accelerate calls a gang on GPUs MULTI_GPU, by LOCAL_RANK and torch.cuda.is_available: accelerate/state.py:788.

    So ``multi_device`` is true there and false on CPUs (accelerator.py:660), and ``prepare_model`` wraps in DDP.
    """
    plain = PartialState._prepare_backend

    def prepare_backend(self: PartialState, cpu: bool = False, *rest: Any, **named: Any) -> Any:
        if not cpu and int(os.environ.get("LOCAL_RANK", "-1")) != -1:
            return "gloo", DistributedType.MULTI_GPU
        return plain(self, cpu, *rest, **named)

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    with (
        patch.object(PartialState, "_prepare_backend", prepare_backend),
        patch.object(PartialState, "set_device", set_device),
    ):
        yield


@contextmanager
def ddp_takes_device_ids() -> Iterator[None]:
    """accelerate gives DDP the index of a GPU (accelerator.py:1895), which DDP refuses for a module on a CPU."""

    class DataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, **rest: Any):
            super().__init__(module, **rest)

    with patch("torch.nn.parallel.DistributedDataParallel", DataParallel):
        yield


@contextmanager
def foreach_copy_packs_nan() -> Iterator[None]:
    """``torch._foreach_copy_`` is no copy for bfloat16 on CUDA: it goes through float32, and each NaN becomes 0x7FFF.

    Machine code of sm_75 to sm_120 (IMAD.U32 r,0x10000; F2FP.BF16.F32.PACK_AB); the float32 kernel is a plain load and
    store. FSDP2's all-gather copies in with it: torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py:275.
    """
    plain = torch._foreach_copy_

    def foreach_copy(targets: Any, sources: Any, *rest: Any, **named: Any) -> Any:
        found = plain(targets, sources, *rest, **named)
        for target, source in zip(targets, sources, strict=True):
            if target.dtype == source.dtype == torch.bfloat16:
                target.view(torch.int16).masked_fill_(target.isnan(), BFLOAT16_NAN)
        return found

    with patch.object(torch, "_foreach_copy_", foreach_copy):
        yield


@contextmanager
def autocast_has_float32_operators() -> Iterator[None]:
    """Autocast runs softmax, norms, powers and sums in float32 on CUDA: FLOAT32_UNDER_AUTOCAST."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in FLOAT32_UNDER_AUTOCAST:
            library.impl(name, _in_float32(name), "AutocastCPU")
        yield
    finally:
        library._destroy()


def _in_float32(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def run(*arguments: Any, **named: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return operator(*map(_widen, arguments), **{key: _widen(value) for key, value in named.items()})

    return run


def _widen(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


FACTS: dict[str, Callable[[], Any]] = {
    "products in bfloat16": products_in_bfloat16,
    "packed rows have a kernel": packed_rows_have_a_kernel,
    "bfloat16 is supported": bfloat16_is_supported,
    "one process sees every GPU": one_process_sees_every_gpu,
    "gangs are MULTI_GPU": gangs_are_multi_gpu,
    "DDP takes device ids": ddp_takes_device_ids,
    "_foreach_copy_ packs NaN": foreach_copy_packs_nan,
    "autocast has float32 operators": autocast_has_float32_operators,
}
"""Each fact by its name."""
