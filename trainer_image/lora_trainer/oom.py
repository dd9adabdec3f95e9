"""How often the kernel has ended a process of this container for want of memory."""

from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
SELF_CGROUP = Path("/proc/self/cgroup")


def count_oom_kills(root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP) -> int:
    """Value of the oom_kill counter of this process's cgroup, version 1 or 2; 0 where it cannot be read.

    In a container the cgroup's own directory is mounted at the root; outside, it is below it.
    """
    for file in _candidates(root, self_cgroup):
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdigit():
                return int(value)
    return 0


def _candidates(root: Path, self_cgroup: Path) -> list[Path]:
    found = []
    try:
        entries = self_cgroup.read_text(encoding="utf-8").splitlines()
    except OSError:
        entries = []
    for entry in entries:
        number, controllers, path = [*entry.split(":", 2), "", ""][:3]
        inside = path.lstrip("/")
        if number == "0" and not controllers:
            found += [root / inside / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [root / "memory" / inside / "memory.oom_control", root / "memory" / "memory.oom_control"]
    return found
