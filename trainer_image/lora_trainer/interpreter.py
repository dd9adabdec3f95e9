"""Where our Python processes take code from: the image, and never a directory that a run can write to or mounts.

``python -m`` puts the current directory first on the path, which in a pod is the scratch directory. Packages that are
looked for and not there (bitsandbytes looks for ``kernels`` on some CPUs) would be found in it.
"""

import sys

OWN_CODE_ONLY = {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
"""``-P`` and ``-s`` for processes that libraries start themselves."""

CODE_CACHES = {
    "CUDA_CACHE_PATH": "cuda",
    "HF_MODULES_CACHE": "modules",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "TRITON_CACHE_DIR": "triton",
}
"""Variables with directories from which libraries load code again that they have written, and a name for each."""


def python_command(module: str, *arguments: str) -> list[str]:
    """Command line that runs ``module`` in another interpreter, without the current directory or a user's packages."""
    return [sys.executable, "-P", "-s", "-m", module, *arguments]
