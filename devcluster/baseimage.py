"""The base image of Dockerfiles: a small Debian with Python, made by debootstrap."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from devcluster import pins
from devcluster.paths import cache
from devcluster.progress import DevclusterError, run_logged, say

PACKAGES = ("ca-certificates", "python3", "python3-venv")
_DROPPED = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc", "usr/share/man", "usr/share/locale")


def buildah(*arguments: str | Path) -> list[str | Path]:
    """Return a buildah command that keeps all it stores in the cache."""
    store = cache() / "buildah"
    return ["buildah", f"--root={store / 'root'}", f"--runroot={store / 'run'}", "--storage-driver=overlay", *arguments]


def buildah_environment() -> dict[str, str]:
    """Return the environment of buildah, whose temporary files may hold a whole image."""
    temporary = cache() / "buildah" / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    return os.environ | {"TMPDIR": str(temporary)}


def query(*arguments: str | Path) -> str:
    """Run a buildah command; return what it prints, or raise with what it says."""
    done = subprocess.run(buildah(*arguments), capture_output=True, text=True, env=buildah_environment())
    if done.returncode != 0:
        raise DevclusterError(f"buildah {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def base_name(suite: str = pins.DEBIAN_SUITE, packages: Sequence[str] = PACKAGES) -> str:
    """Return the name of the base image, which says what is in it."""
    key = hashlib.sha256(" ".join((suite, *sorted(packages), "/", *_DROPPED)).encode()).hexdigest()[:12]
    return f"localhost/devcluster-base:{suite}-{key}"


def ensure_base() -> str:
    """Make the base image where there is none yet; return its name. The caller holds the store's lock."""
    name = base_name()
    if subprocess.run(buildah("inspect", "--type=image", name), capture_output=True).returncode == 0:
        return name
    log = cache() / "logs" / "base-image.log"
    with tempfile.TemporaryDirectory(prefix="base-", dir=buildah_environment()["TMPDIR"]) as folder:
        root = Path(folder) / "root"
        include = ",".join(sorted(PACKAGES))
        run_logged(
            "debootstrap",
            ["debootstrap", "--variant=minbase", f"--include={include}", pins.DEBIAN_SUITE, root],
            log,
            timeout=900,
        )
        for dropped in _DROPPED:
            shutil.rmtree(root / dropped, ignore_errors=True)
            (root / dropped).mkdir(parents=True, exist_ok=True)
        container = query("from", "--pull-never", "scratch")
        try:
            query("add", "--quiet", container, root, "/")
            query("commit", "--quiet", container, name)
        finally:
            query("rm", container)
    say(f"base image made (Debian {pins.DEBIAN_SUITE}, {', '.join(PACKAGES)})")
    return name
