"""Makes the virtual environment for development, demo and tests: ``python3 tools/venv.py``.

It lies in the cache, keyed by the pins, so that a second clone is ready at once; ``.venv`` points to it. Uses the
standard library only, because nothing else is installed yet.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints" / "dev.txt"
READY = ".ready"
NEEDED_GIB = 8


def read_requirements() -> list[str]:
    """Requirements of the project with every extra, as pyproject.toml lists them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return sorted([*project["dependencies"], *(line for extra in sorted(extras) for line in extras[extra])])


def compute_key(requirements: list[str], constraints: str) -> str:
    """Name of the environment: equal for equal pins and equal Python."""
    parts = ["\n".join(requirements), constraints, sys.version, sys.prefix]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def find_problem(cache: Path) -> str | None:
    """What keeps the environment from being made, with the remedy, or ``None``."""
    if sys.platform != "linux":
        return "this needs Linux: the development cluster uses its namespaces. Use a Linux machine or VM."
    if sys.version_info < (3, 11):  # noqa: UP036 - this file alone is run by any python3
        return f"this needs Python 3.11 or later, and python3 is {sys.version.split()[0]}. Set PYTHON=python3.11."
    try:
        import ensurepip  # noqa: F401 - Debian ships Python without it
    except ImportError:
        return "python3 cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv."
    free = shutil.disk_usage(cache).free / 2**30
    if free < NEEDED_GIB:
        return f"{cache} has {free:.1f} GiB free and {NEEDED_GIB} are needed. Free some, or set LORA_CACHE elsewhere."
    return None


def make_environment(target: Path, requirements: list[str]) -> None:
    """Installs ``requirements`` at the pinned versions into a new environment at ``target``.

    Raises:
        subprocess.CalledProcessError: pip failed; its output has been shown.
    """
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
    pip = [str(target / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar=off"]
    with (target / "install.log").open("w") as log:
        outcome = subprocess.run([*pip, "-c", str(CONSTRAINTS), *requirements], stdout=log, stderr=subprocess.STDOUT)
    if outcome.returncode:
        print("\n".join((target / "install.log").read_text().splitlines()[-15:]), file=sys.stderr)
        outcome.check_returncode()
    (target / READY).touch()


def main() -> int:
    """Returns 1, after one clear message, where it cannot work."""
    cache = Path(os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora-operator") / "venv"
    cache.mkdir(parents=True, exist_ok=True)
    requirements = read_requirements()
    target = cache / compute_key(requirements, CONSTRAINTS.read_text())
    with (cache / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / READY).exists():
            problem = find_problem(cache)
            if problem:
                print(f"Cannot set up Python: {problem}", file=sys.stderr)
                return 1
            print("==> installing the Python packages (2 to 4 minutes the first time)", flush=True)
            start = time.monotonic()
            try:
                make_environment(target, requirements)
            except subprocess.CalledProcessError:
                print(f"Cannot set up Python: the installation failed; all of its output: {target}/install.log")
                return 1
            print(f"==> [{time.monotonic() - start:.1f}s] Python packages installed", flush=True)
    link = ROOT / ".venv"
    if link.is_symlink() or link.exists():
        if link.resolve() == target.resolve():
            return 0
        if not link.is_symlink():
            print(f"Cannot set up Python: {link} is not a link made by this tool. Move it away.", file=sys.stderr)
            return 1
        link.unlink()
    link.symlink_to(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
