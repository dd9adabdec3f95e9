"""What the tests take for true of a GPU, asked of the GPU: tests/support/gputypes.py emulates it, one fact a name.

A fact that does not hold means that the tests' emulation is wrong, or that another version of a library decides
otherwise. Each question takes less than a second, and works on a CPU too, where the answer is no.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers.training_args
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn

from lora_trainer import varlen
from lora_trainer.devices import traits

BFLOAT16_NAN = 0x7FFF


@dataclass(frozen=True)
class Answer:
    """Whether a fact holds, and the figure that says so."""

    holds: bool
    figure: str


def products_in_bfloat16(device: torch.device) -> Answer:
    """Products of bfloat16 are summed in float32: their error is that of rounding once."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).to(torch.bfloat16) for _ in range(2))
    exact = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).double().cpu()
    error = float((found - exact).abs().max() / exact.abs().max())
    return Answer(
        traits(device).products == torch.bfloat16 and error < 2**-8, f"largest error {error:.1e} of the largest"
    )


def packed_rows_have_a_kernel(device: torch.device) -> Answer:
    """The kernel for packed rows gives what attention within each document does."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(12, 2, 16, generator=generator).to(device, torch.bfloat16) for _ in range(3)]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    try:
        found = varlen.varlen_attn(*heads, bounds, bounds, 7, 7, window_size=(-1, 0))
    except RuntimeError as error:
        return Answer(holds=False, figure=str(error)[:80])
    assert isinstance(found, torch.Tensor)  # for the type checker
    parts = ([one[start:end].transpose(0, 1).float() for one in heads] for start, end in ((0, 5), (5, 12)))
    exact = torch.cat([nn.functional.scaled_dot_product_attention(*part, is_causal=True) for part in parts], 1)
    error = float((found.transpose(0, 1).float() - exact).abs().max())
    return Answer(error < 2**-6, f"largest error {error:.1e}")


def bfloat16_is_supported(device: torch.device) -> Answer:
    """Transformers lets bf16 be asked for."""
    found = bool(transformers.training_args.is_torch_bf16_gpu_available())
    return Answer(found, f"is_torch_bf16_gpu_available: {found}")


def one_process_sees_every_gpu(device: torch.device) -> Answer:
    """Transformers' n_gpu is the number of visible GPUs, for a process that is alone."""
    with TemporaryDirectory() as directory, outside_a_gang():
        own = transformers.TrainingArguments(directory, use_cpu=traits(device).accelerate_cpu, report_to="none").n_gpu
    visible = torch.cuda.device_count()
    return Answer(visible > 0 and own == visible, f"n_gpu {own} of {visible} visible")


def gangs_are_multi_gpu(device: torch.device) -> Answer:
    """Accelerate's name for a gang on GPUs."""
    with patch.dict(os.environ, {"LOCAL_RANK": "0"}):
        state = PartialState.__new__(PartialState)
        backend, kind = PartialState._prepare_backend(state, traits(device).accelerate_cpu)  # noqa: SLF001 - the question
    return Answer(kind == DistributedType.MULTI_GPU, f"{kind.value}, backend {backend}")


def ddp_takes_device_ids(device: torch.device) -> Answer:
    """DDP wraps a module with the index of its GPU, as accelerate does."""
    dist.init_process_group(traits(device).backends.device, store=dist.HashStore(), rank=0, world_size=1)
    try:
        index = device.index or 0
        torch.nn.parallel.DistributedDataParallel(nn.Linear(2, 2).to(device), device_ids=[index], output_device=index)
    except ValueError as error:
        return Answer(holds=False, figure=str(error)[:80])
    finally:
        dist.destroy_process_group()
    return Answer(holds=True, figure=f"device_ids=[{index}]")


def foreach_copy_packs_nan(device: torch.device) -> Answer:
    """All 65,536 patterns of bfloat16 through ``_foreach_copy_``: NaNs become 0x7FFF, and nothing else changes."""
    words = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    source = words.view(torch.bfloat16).to(device)
    target = torch.empty_like(source)
    torch._foreach_copy_([target], [source])
    found = target.cpu().view(torch.uint16).int()
    expected = torch.where(source.cpu().isnan(), BFLOAT16_NAN, words.int())
    changed = int((found != words.int()).sum())
    return Answer(torch.equal(found, expected), f"{changed} of {2**16} patterns change")


FLOAT32_OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "pow.Tensor_Scalar": lambda x: x**1.5,
    "pow.Tensor_Tensor": lambda x: x**x,
    "pow.Scalar": lambda x: torch.pow(1.5, x),
    "reciprocal": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "softplus": nn.functional.softplus,
    "softmax.int": lambda x: torch.softmax(x, -1),
    "log_softmax.int": lambda x: torch.log_softmax(x, -1),
    "layer_norm": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: nn.functional.rms_norm(x, x.shape[-1:]),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "cumsum": lambda x: torch.cumsum(x, -1),
    "cumprod": lambda x: torch.cumprod(x, -1),
    "prod": torch.prod,
    "sum": torch.sum,
    "sum.dim_IntList": lambda x: torch.sum(x, -1),
    "nll_loss": lambda x: nn.functional.nll_loss(x, torch.zeros(len(x), dtype=torch.int64, device=x.device)),
}
"""By the name of the overload: operators that autocast runs in float32."""


def autocast_has_float32_operators(device: torch.device) -> Answer:
    """Operators on bfloat16 give float32 under autocast."""
    given = torch.full((4, 4), 0.5, dtype=torch.bfloat16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        narrow = [name for name, run in FLOAT32_OPERATORS.items() if run(given).dtype != torch.float32]
    return Answer(not narrow, f"in bfloat16: {', '.join(narrow) or 'none'}")


FACTS: dict[str, Callable[[torch.device], Answer]] = {
    "products in bfloat16": products_in_bfloat16,
    "packed rows have a kernel": packed_rows_have_a_kernel,
    "bfloat16 is supported": bfloat16_is_supported,
    "one process sees every GPU": one_process_sees_every_gpu,
    "gangs are MULTI_GPU": gangs_are_multi_gpu,
    "DDP takes device ids": ddp_takes_device_ids,
    "_foreach_copy_ packs NaN": foreach_copy_packs_nan,
    "autocast has float32 operators": autocast_has_float32_operators,
}
"""Each question by its name in tests/support/gputypes.py."""


@contextmanager
def outside_a_gang() -> Iterator[None]:
    """Without the variables of a launcher, and without what accelerate keeps of a process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    with patch.dict(os.environ):
        for name in names:
            os.environ.pop(name, None)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - accelerate has no public call for it
