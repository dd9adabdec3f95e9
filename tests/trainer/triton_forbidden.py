"""A training process on the CPU that decides as on a GPU wherever a library would take a kernel of Triton there.

Triton itself refuses: to compile its driver, and to run a kernel. What is forced, and where it was read:

- TRL's head for log-probabilities (trl 1.16, kernels/chunked_logprob.py, ``_use_triton``, by the device's type);
- torch's operators that have a kernel of Triton for CUDA (torch 2.13, torch/_native: aten::bmm of a column and a row);
- generate(), which compiles on CUDA where the cache is static (transformers 5.23, generation/utils.py,
  ``_valid_auto_compile_criteria``), by torch.compile, whose kernels on CUDA are Triton's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from lora_trainer.worker import run_worker

ADAPTER = "LORA_TEST_ADAPTER"
"""Where the process looks for the published adapter, which it measures as ``lora_trainer evaluate`` does."""


class TritonUsedError(AssertionError):
    """Something asked Triton for code."""


def refuse(*_: Any, **__: Any) -> Any:
    raise TritonUsedError("a default path asked for a kernel that Triton compiles")


def forbid_triton() -> None:
    """Triton compiles and runs nothing in this process; nor does torch.compile."""
    import torch
    import triton.backends.nvidia.driver
    import triton.runtime.build
    from triton.runtime import JITFunction

    triton.runtime.build._build = refuse
    triton.runtime.build.compile_module_from_src = refuse
    triton.backends.nvidia.driver.compile_module_from_src = refuse
    JITFunction.run = refuse
    torch.compile = refuse


def decide_as_on_a_gpu() -> None:
    """Takes the branches that libraries take by the type of the device."""
    import trl.kernels.chunked_logprob
    import trl.trainer.utils
    from transformers import CompileConfig, GenerationMixin

    trl.kernels.chunked_logprob._use_triton = lambda device: True
    trl.trainer.utils._use_triton = lambda device: True
    override_products()
    decide = GenerationMixin._valid_auto_compile_criteria

    def decide_for_all_devices(self: Any, model_kwargs: Any, generation_config: Any) -> bool:
        generation_config.compile_config = CompileConfig()
        generation_config.compile_config._compile_all_devices = True
        return bool(decide(self, model_kwargs, generation_config))

    GenerationMixin._valid_auto_compile_criteria = decide_for_all_devices


def override_products() -> None:
    """What torch/_native registers for CUDA, for the CPU, with its own condition but for the device."""
    from torch._native import registry, triton_utils
    from torch._native.ops.bmm_outer_product.triton_impl import _is_outer_product
    from torch._native.ops.bmm_outer_product.triton_kernels import bmm_outer_product

    triton_utils.register_op_override(
        "aten", "bmm", "CPU", cond=_is_outer_product, impl=bmm_outer_product, allow_multiple_override=True
    )
    registry._register_overrides_from_graph("bmm", "CPU", registry._graphs["bmm", "CPU"])


def train_without_triton(run_file: Path) -> int:
    """A real worker, and then a measurement of what it published."""
    decide_as_on_a_gpu()
    forbid_triton()
    code = run_worker(run_file)
    if code == 0:
        from lora_trainer.measure import measure

        run = json.loads(run_file.read_text())
        (adapter,) = Path(os.environ[ADAPTER]).glob("**/adapter_model.safetensors")
        found = measure(
            model=run["baseModel"]["uri"], data=run["dataset"]["eval"]["uri"], adapter=f"file://{adapter.parent}",
            limit=4, max_new_tokens=4,
        )  # fmt: skip
        sys.stdout.write(f"measured {found.loss}\n")
        sys.stdout.flush()
    return code
