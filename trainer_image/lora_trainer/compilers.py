"""Code that libraries compile while they run: kept out of every default path, and looked for where a lever needs it.

Triton compiles a kernel at its first use, and before the first of them its driver in C, against Python's headers. The
image has neither a compiler nor headers, and a pod that compiles starts later. So nothing of the trainer needs it
unless LORA_SPEED asks for it (docs/decisions/037).
"""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch.backends import python_native

from lora_trainer.errors import BadSpecError


def keep_compiled_kernels_out() -> None:
    """Gives PyTorch its own operators back where it has kernels of Triton for them on GPUs.

    torch 2.13 replaces ``aten::bmm`` of a column and a row so (torch/_native/ops/bmm_outer_product). Such a product is
    eager attention (Gemma 2) over one token, and was the rotary embedding of every model in older transformers.
    """
    python_native.triton.enabled = False


def missing_for_triton(env: Mapping[str, str] = os.environ) -> list[str]:
    """What Triton 3.7 needs to compile and does not find (triton/runtime/build.py), as words."""
    missing = [] if find_spec("triton") else ["the package triton"]
    compilers = [env["CC"]] if "CC" in env else ["gcc", "clang"]
    if not any(shutil.which(name, path=env.get("PATH")) for name in compilers):
        missing.append("a C compiler (gcc or clang, or the one that CC names)")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if not (headers / "Python.h").is_file():
        missing.append(f"Python's headers ({headers}/Python.h)")
    return missing


def check_triton(lever: str, env: Mapping[str, str] = os.environ) -> None:
    """Raises BadSpecError unless Triton can compile here, which ``lever`` (words of LORA_SPEED) needs on GPUs."""
    if missing := missing_for_triton(env):
        raise BadSpecError(
            f"{lever} needs Triton, which compiles its kernels, and the image lacks {' and '.join(missing)}: add it to "
            "an image of your own, or leave the lever out"
        )
