"""A cluster's own network, mount and process namespaces.

The supervisor is the init of the process namespace: when it ends, the kernel ends every
process, mount, interface and iptables rule of the cluster with it. Only the empty
control groups of the pods are left to remove by hand.
"""

import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.components import SERVICE_RANGE
from devcluster.preflight import SYSTEM_PATH
from devcluster.progress import DevclusterError, tail, wait_for
from devcluster.supervision import SCRIPT, Supervision

# What the kubelet would set for the whole machine: it is shown these files instead, finds
# the values that it wants, and leaves the machine's own alone.
KUBELET_SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Network:
    """A /24 between the machine (.1) and the cluster (.2), one for each cluster."""

    number: int

    @property
    def interface(self) -> str:
        """The machine's end of the cable."""
        return f"lora{self.number}"

    @property
    def host_ip(self) -> str:
        """The machine, as the cluster sees it."""
        return f"10.89.{self.number}.1"

    @property
    def node_ip(self) -> str:
        """The cluster, as the machine and the pods see it."""
        return f"10.89.{self.number}.2"


def choose_network(in_use: Iterable[str]) -> Network:
    """Return the first network that overlaps none of ``in_use`` (CIDR strings)."""
    taken = [ipaddress.ip_network(cidr, strict=False) for cidr in in_use]
    for number in range(256):
        candidate = ipaddress.ip_network(f"10.89.{number}.0/24")
        if not any(candidate.overlaps(other) for other in taken):
            return Network(number)
    raise DevclusterError("every network 10.89.0.0/24 to 10.89.255.0/24 is in use on this machine")


def networks_in_use() -> list[str]:
    """Return the IPv4 destinations that this machine routes to, its default route aside."""
    listing = subprocess.run(["ip", "-4", "-json", "route"], check=True, capture_output=True, text=True)
    return [route["dst"] for route in json.loads(listing.stdout) if route["dst"] != "default"]


def _claim(directory: Path) -> str:
    """Return the mark on the interface of the cluster in ``directory``."""
    # Not its number, which another cluster may bear by the time that this one is cleaned.
    return f"devcluster {hashlib.sha256(str(directory).encode()).hexdigest()[:16]}"


def find_interfaces(directory: Path) -> list[Path]:
    """Return the machine's interfaces of the cluster in ``directory``: one, or none."""
    claim = _claim(directory)
    found = []
    for alias in Path("/sys/class/net").glob("lora*/ifalias"):
        with contextlib.suppress(OSError):
            if alias.read_text().strip() == claim:
                found.append(alias.parent)
    return found


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise DevclusterError(f"{shlex.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")


def _commands(directory: Path) -> dict[int, list[str]]:
    """Return pid -> command of the launcher and the init of the cluster in ``directory``.

    Found by their command line, so that no pid file can be stale or missing.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                command = (entry / "cmdline").read_text(errors="replace").split("\0")[:-1]
                if command[-2:] == ["--listen", str(directory)] and command[-3].endswith(f"/{SCRIPT.name}"):
                    found[int(entry.name)] = command
    return found


def find_processes(directory: Path) -> list[int]:
    """Return the pids of the launcher and the init of the cluster in ``directory``."""
    return sorted(_commands(directory))


def find_init(directory: Path) -> int | None:
    """Return the pid of the init of the cluster in ``directory``, as this machine counts."""
    # The launcher's command is the same with its own words before it.
    return next((pid for pid, command in _commands(directory).items() if command[1] == "-I"), None)


def connect(directory: Path) -> Supervision:
    """Speak with the supervisor of the cluster in ``directory``; raises OSError without one."""
    # Through a descriptor, since the path of a socket may have 107 bytes at most.
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        return Supervision.at(Path(f"/proc/self/fd/{folder}/supervisor.sock"), directory / "logs")
    finally:
        os.close(folder)


def setup_script(directory: Path) -> str:
    """Return the shell script that arranges the namespaces from inside; pure."""
    lines = [
        "set -e",
        "mount -t tmpfs -o mode=755 devcluster /run",
        "mkdir -p /run/lock /run/netns /run/devcluster",
        "mount -t tmpfs -o mode=755 devcluster /var/lib",
        "mount -t tmpfs -o mode=755 devcluster /var/log",
        "ip link set lo up",
        "sysctl -qw net.ipv4.ip_forward=1",
    ]
    for name in KUBELET_SYSCTLS:
        source = directory / "sysctl" / name.replace("/", ".")
        lines.append(f"mount --bind {shlex.quote(str(source))} /proc/sys/{name}")
    return "\n".join(lines) + "\n"


def inside(init: int, argv: Sequence[str]) -> list[str]:
    """Return the command that runs ``argv`` in the namespaces of the process ``init``."""
    return ["nsenter", f"--target={init}", "--mount", "--net", "--pid", "--", *argv]


def create(directory: Path, network: Network) -> int:
    """Start the supervisor in namespaces of its own, joined to the machine by ``network``.

    Returns the pid of its init as this machine counts.
    """
    logs = directory / "logs"
    for folder in (logs, directory / "sysctl", directory / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, value in KUBELET_SYSCTLS.items():
        (directory / "sysctl" / name.replace("/", ".")).write_text(f"{value}\n")
    log = logs / "supervisor.log"
    with log.open("ab") as output:
        # setsid --fork: nobody's child, so that it outlives this process and is not its zombie.
        subprocess.run(
            [
                *("setsid", "--fork", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL"),
                *("--mount-proc", "--propagation=private"),
                *(sys.executable, "-I", str(SCRIPT), "--listen", str(directory)),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"PATH": SYSTEM_PATH, "TMPDIR": str(directory / "tmp")},
            cwd="/",
        )
    wait_for(
        "the supervisor",
        (directory / "supervisor.sock").exists,
        10,
        log=log,
        failed=lambda: None if find_processes(directory) else "it ended",
    )
    init = find_init(directory)
    if init is None:
        raise DevclusterError(f"the supervisor ended at once; {tail(log)}")
    _run(*("ip", "link", "add", network.interface, "type", "veth", "peer", "name", "eth0", "netns", str(init)))
    _run("ip", "link", "set", network.interface, "alias", _claim(directory))
    _run("ip", "addr", "add", f"{network.host_ip}/24", "dev", network.interface)
    _run("ip", "link", "set", network.interface, "up")
    script = setup_script(directory) + f"ip addr add {network.node_ip}/24 dev eth0\nip link set eth0 up\n"
    # kube-proxy changes the destination of what is sent to a Service; without a route nothing would be sent. The API
    # server needs it for webhooks.
    script += f"ip route add {SERVICE_RANGE} dev eth0\n"
    done = subprocess.run(inside(init, ["sh"]), input=script, capture_output=True, text=True, env={"PATH": SYSTEM_PATH})
    if done.returncode != 0:
        raise DevclusterError(f"arranging the namespaces: {done.stderr.strip()}; {tail(log)}")
    return init


def _cgroup_hierarchies() -> Iterator[Path]:
    """Yield the root of every control group hierarchy: one on v2, one a controller on v1."""
    if (_CGROUPS / "cgroup.controllers").exists():
        yield _CGROUPS
    elif _CGROUPS.exists():
        yield from (entry for entry in sorted(_CGROUPS.iterdir()) if (entry / "cgroup.procs").exists())


def _delegate(root: Path, group: Path) -> None:
    """Hand every controller of cgroup v2 that the kubelet uses down to the groups in ``group``."""
    available = set((root / "cgroup.controllers").read_text().split())
    for parent in (root, group):
        for controller in sorted(available & {"cpu", "cpuset", "hugetlb", "io", "memory", "pids"}):
            try:
                (parent / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError as error:
                raise DevclusterError(
                    f"the control group {parent} cannot limit {controller} of groups in it ({error.strerror}): in a"
                    " container, start that with --cgroupns=host"
                ) from None


def create_cgroup(name: str) -> None:
    """Make an empty control group in every hierarchy, with every controller on v2."""
    for root in _cgroup_hierarchies():
        group = root / name
        group.mkdir(exist_ok=True)
        if root == _CGROUPS:
            _delegate(root, group)
        if (root / "cpuset.cpus").exists() and not (group / "cpuset.cpus").read_text().strip():
            # An empty cpuset of v1 takes no process.
            for file in ("cpuset.cpus", "cpuset.mems"):
                (group / file).write_text((root / file).read_text())


def cgroup_processes(name: str) -> list[int]:
    """Return the processes in a control group and below it, as this machine counts."""
    return sorted(
        {
            int(line)
            for root in _cgroup_hierarchies()
            for file in (root / name).rglob("cgroup.procs")
            for line in file.read_text().split()
        }
    )


def _remove_cgroup(group: Path) -> bool:
    if not group.exists():
        return True
    try:
        for folder, _names, _files in os.walk(group, topdown=False):
            Path(folder).rmdir()
    except OSError:
        return False  # a process that was killed is still on its way out
    return True


def destroy(directory: Path, cgroups: Iterable[str]) -> None:
    """End the cluster in ``directory`` and all that it left, whatever state it is in."""
    # By descriptor: a pid may be given to another process, and an init that is on its way
    # out has no command line any more although its children still live.
    handles = []
    for pid in find_processes(directory):
        try:
            handles.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    for handle in handles:
        ended, _, _ = select.select([handle], [], [], 30)
        os.close(handle)
        if not ended:
            raise DevclusterError(f"the processes of {directory} did not end within 30 s of kill -9")
    for interface in find_interfaces(directory):
        # The kernel removes it with the namespace, but some time later.
        subprocess.run(["ip", "link", "delete", interface.name], capture_output=True)
    wait_for("the cluster's interface to go", lambda: not find_interfaces(directory), 10)
    for name in cgroups:
        for root in _cgroup_hierarchies():
            group = root / name
            wait_for(f"the control group {group} to empty", functools.partial(_remove_cgroup, group), 10)
