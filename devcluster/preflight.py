"""What a machine must have before a cluster starts on it; installs what it can."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from devcluster.paths import cache, file_lock
from devcluster.progress import DevclusterError, run_logged, say

# Where distributions put the CNI plugins.
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
# Services run with this, whatever the caller's PATH: iptables and mount live in sbin.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_POLICY = Path("/usr/sbin/policy-rc.d")
_HIDDEN = ("/run", "/var/run", "/var/lib", "/var/log", "/proc", "/sys", "/dev")
_CLUSTER_FREE = 5 * 2**30

CLUSTER_PROGRAMS: dict[str, str] = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "ipset": "ipset",
    "conntrack": "conntrack",
    "busybox": "busybox-static",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
}
IMAGE_PROGRAMS: dict[str, str] = {"buildah": "buildah", "debootstrap": "debootstrap"}


def missing_packages(programs: dict[str, str]) -> list[str]:
    """Return the Debian packages of the programs that this machine lacks."""
    packages = {package for program, package in programs.items() if shutil.which(program, path=SYSTEM_PATH) is None}
    if "containerd" in programs and cni_folder() is None:
        packages.add("containernetworking-plugins")
    return sorted(packages)


def cni_folder() -> Path | None:
    """Return the folder of the CNI plugins, or None where there are none."""
    return next((folder for folder in CNI_FOLDERS if (folder / "ptp").exists()), None)


def require_root() -> None:
    """Raise unless this is root on Linux."""
    if sys.platform != "linux":
        raise DevclusterError(
            "the development cluster needs Linux. Elsewhere set KUBECONFIG to a cluster that runs already (kind, a GPU"
            " cluster), and it is used instead"
        )
    if os.geteuid() != 0:
        raise DevclusterError(
            "the development cluster needs root, for network and mount namespaces: run this with sudo, or set"
            " KUBECONFIG to a cluster that runs already (kind, a GPU cluster), and it is used instead"
        )


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Keep packages from starting their daemons: the cluster runs a containerd of its own."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


def _install(packages: Sequence[str]) -> None:
    say(f"installing {', '.join(packages)} with apt-get")
    log = cache() / "logs" / "apt-get.log"
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_service_starts():
        run_logged("apt-get update", ["apt-get", "update"], log, env=env, timeout=300)
        install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
        run_logged("apt-get install", install, log, env=env, timeout=600)


def require_programs(programs: dict[str, str]) -> None:
    """Install the missing programs where apt-get can, else raise with their names."""
    packages = missing_packages(programs)
    if packages and shutil.which("apt-get") is not None:
        with file_lock(cache() / "apt-get.lock"):
            packages = missing_packages(programs)
            if packages:
                _install(packages)
        packages = missing_packages(programs)
    if packages:
        raise DevclusterError(
            f"missing on this machine: {', '.join(packages)} (Debian's names). Install them with your package manager,"
            " or set KUBECONFIG to a cluster that runs already"
        )


def require_free(path: Path, needed: int, what: str) -> None:
    """Raise when fewer than ``needed`` bytes are free where ``path`` lies or will lie."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DevclusterError(
            f"{what} needs {needed >> 30} GB and {existing} has {free / 2**30:.1f} GB free: free some, or set"
            " LORA_CACHE to a folder on a larger disk"
        )


def _require_namespaces() -> None:
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    if tried.returncode != 0:
        raise DevclusterError(
            f"this machine does not let root make namespaces ({tried.stderr.strip()}): inside a container it needs"
            " --privileged; or set KUBECONFIG to a cluster that runs already"
        )


def _filesystem(path: Path) -> str:
    return subprocess.run(
        ["stat", "--file-system", "--format=%T", path], check=True, capture_output=True, text=True
    ).stdout.strip()


def check_cluster(directory: Path) -> None:
    """Check (and install) all that a cluster with its files in ``directory`` needs."""
    require_root()
    require_programs(CLUSTER_PROGRAMS)
    resolved = directory.resolve()
    for hidden in _HIDDEN:
        if resolved.is_relative_to(hidden):
            raise DevclusterError(
                f"the cluster has a {hidden} of its own: set LORA_CACHE to a folder elsewhere than {resolved}"
            )
    directory.mkdir(parents=True, exist_ok=True)
    kind = _filesystem(directory)
    if kind in ("overlayfs", "tmpfs", "ramfs"):
        raise DevclusterError(
            f"{directory} is on {kind}, where containers cannot keep their layers: set LORA_CACHE to a folder on a disk"
            " (in a container: on a volume)"
        )
    require_free(directory, _CLUSTER_FREE, "a cluster")
    _require_namespaces()
