"""Builds the release before this one from the history, for the tests of versions: ``python tools/skew.py``.

What is built lies in the cache, by its commit: the wheel of operator and trainer, and next to it the same unpacked,
which is what the tests put on a PYTHONPATH. Nothing is downloaded.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASED = "6c933fa"
"""Commit of the release that upgrades start from."""

READY = ".ready"


def place() -> Path:
    """Where the release is, or is going to be."""
    cache = Path(os.environ.get("LORA_CACHE") or Path.home() / ".cache" / "lora-operator")
    return cache / "skew" / RELEASED


def build(target: Path) -> None:
    """Builds the release into ``target``.

    Raises:
        subprocess.CalledProcessError: git does not have the commit, or pip failed; its output has been shown.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive, source = Path(scratch) / "source.tar", Path(scratch) / "source"
        subprocess.run(["git", "archive", f"--output={archive}", RELEASED], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter="data")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
        pip += ["--no-index", "--no-build-isolation", f"--wheel-dir={target}", str(source)]
        subprocess.run(pip, check=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(target / "site")
    (target / READY).touch()


def main() -> int:
    """Returns 1, after one clear message, where it cannot work."""
    target = place()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{RELEASED}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / READY).exists():
            return 0
        try:
            build(target)
        except subprocess.CalledProcessError as error:
            print(f"Cannot build the release before this one: {error}. A shallow clone lacks it: git fetch --unshallow")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
