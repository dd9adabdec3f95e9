"""Plants modules where a run can write, and says what code a process loaded from anywhere but the image.

A program of the tests that needs nothing but the standard library and the trainer: its text is given to ``python -c``
in a pod, as ``... plant LOG DIRECTORY...`` and ``... check LOG ROOT...``. ``LOG`` is where planted code says that it
ran. ``ROOT`` are directories whose code is the image's, beside the interpreter's own.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = (
    "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "obstore", "wandb", "mlflow",
    "tensorboard", "triton", "tensorboard.summary.writer.event_file_writer", "safetensors", "tokenizers", "pyarrow",
)  # fmt: skip
"""What a start of the training imports, or a tracker's process."""

PLANTED = (
    "kernels", "triton", "bitsandbytes", "sitecustomize", "usercustomize", "torch", "transformers", "flash_attn",
    "flash_attn_3", "flash_attn_interface", "transformers_modules", "lora_trainer", "lora_api", "numpy", "yaml",
    "wandb", "mlflow", "tensorboard", "vllm", "deepspeed", "apex", "cv2", "librosa", "soundfile", "tensorflow", "jax",
    "comet_ml", "clearml", "neptune", "ray", "optuna", "IPython", "liger_kernel", "intel_extension_for_pytorch",
)  # fmt: skip
"""Modules of ours and of the libraries, and those that the libraries look for and the images do not have."""

SITE = ".local/lib/python3.11/site-packages"
HUB = "hf/hub/models--kernels-community--quantization-bitsandbytes/snapshots/1/build/torch-universal"
PLACES = ("", SITE, "hf/modules", "hf/modules/transformers_modules/model", HUB)
"""Directories below each that a run can write to, where somebody or something might look for code."""


def plant(log: Path, directories: list[Path]) -> None:
    """Writes modules that say in ``log`` that they ran, and a .pth file that would import one."""
    for directory in directories:
        for place in PLACES:
            folder = directory / place
            folder.mkdir(parents=True, exist_ok=True)
            for name in PLANTED:
                path = folder / f"{name}.py"
                path.write_text(f"open({str(log)!r}, 'a').write({str(path)!r} + '\\n')\n", encoding="utf-8")
            (folder / "planted.pth").write_text("import kernels\n", encoding="utf-8")


def check(log: Path, roots: list[str]) -> dict[str, list[str]]:
    """What was loaded from elsewhere, by kind; every list is empty where all is well."""
    ours = own_roots(roots)
    ran: set[str] = set()
    sys.addaudithook(lambda event, arguments: ran.add(arguments[0].co_filename) if event == "exec" else None)
    missing = list(import_all())
    modules = {origin for module in list(sys.modules.values()) for origin in origins(module)}
    mapped = {line.split(maxsplit=5)[5] for line in maps() if is_code(line)}
    found = {name: spec for name in PLANTED if name not in sys.modules and (spec := find(name)) is not None}
    return {
        "not imported": missing,
        "modules": outside(modules, ours),
        "executed": outside(ran, ours),
        "machine code": outside(mapped, [*ours, "/lib/", "/usr/lib/", "/lib64/", "/usr/lib64/"]),
        "would be imported": outside(set(found.values()), ours),
        "path": [entry for entry in sys.path if not is_absolute(entry) or outside({entry}, ours)],
        "planted code that ran": log.read_text(encoding="utf-8").splitlines() if log.exists() else [],
    }


def own_roots(roots: list[str]) -> list[str]:
    """Directories of the interpreter, its standard library and its packages, and ``roots``."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = {sysconfig.get_path(name) for name in names} | {sys.base_prefix, os.path.realpath(sys.executable)}
    zipped = f"{sys.base_prefix}/lib/python{sys.version_info.major}{sys.version_info.minor}.zip"
    return [f"{path}/" for given in {*paths, *roots, zipped} for path in {given, os.path.realpath(given)}]


def import_all() -> Iterator[str]:
    """Imports the libraries and every module of the trainer. Yields what cannot be imported."""
    import lora_trainer

    ours = [f"lora_trainer.{module.name}" for module in pkgutil.iter_modules(getattr(lora_trainer, "__path__", []))]
    for name in (*LIBRARIES, *(name for name in ours if not name.endswith("__main__"))):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a planted module may break it in any way
            yield f"{name}: {error}"


def origins(module: object) -> Iterator[str]:
    """Files and directories that ``module`` came from. Some of torch's name a file that is none: those are relative."""
    spec = getattr(module, "__spec__", None)
    places = [getattr(module, "__file__", None), getattr(spec, "origin", None)]
    search = getattr(spec, "submodule_search_locations", None) or []
    for place in (*places, *(f"{entry}/" for entry in search)):
        if isinstance(place, str) and is_absolute(place):
            yield place


def maps() -> list[str]:
    """Lines of the process's memory map."""
    ctypes.CDLL(None)  # the libraries of the machine are in it in any case
    return Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()


def is_code(line: str) -> bool:
    """Whether ``line`` of a memory map is of a file whose content is executed."""
    parts = line.split(maxsplit=5)
    return len(parts) == 6 and "x" in parts[1] and parts[5].startswith("/") and not parts[5].endswith("(deleted)")


def find(name: str) -> str | None:
    """Where ``import name`` would find a module."""
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin or str(list(spec.submodule_search_locations or []))


def outside(paths: set[str], roots: list[str]) -> list[str]:
    """Those of ``paths`` that are absolute and below none of ``roots``."""

    def is_inside(path: str) -> bool:
        return any(f"{place}/".startswith(root) for place in (path, os.path.realpath(path)) for root in roots)

    return sorted(path for path in paths if is_absolute(path) and not is_inside(path))


def is_absolute(path: str) -> bool:
    """Whether ``path`` is one from the root."""
    return path.startswith("/")


if __name__ == "__main__":
    command, log_file, *rest = sys.argv[1:]
    if command == "plant":
        plant(Path(log_file), [Path(directory) for directory in rest])
    else:
        sys.stdout.write(json.dumps(check(Path(log_file), rest)) + "\n")
