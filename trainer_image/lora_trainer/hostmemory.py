"""How much host memory a process may still take: the least of its control group's limits and the machine's."""

from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
SELF_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def available_bytes(root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP, meminfo: Path = MEMINFO) -> int | None:
    """Bytes that may still be taken, by all processes of the pod together; ``None`` where nothing says.

    File cache counts as free: the kernel gives it up first. Both versions of control groups are read. In a container
    the group's own directory is mounted at the root; outside, it is below it.
    """
    found = [size for size in (_machine(meminfo), *_groups(root, self_cgroup)) if size is not None]
    return min(found) if found else None


def _machine(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and rest.split()[:1]:
            return int(rest.split()[0]) * 1024
    return None


def _groups(root: Path, self_cgroup: Path) -> list[int | None]:
    found = []
    for entry in _lines(self_cgroup):
        number, controllers, path = [*entry.split(":", 2), "", ""][:3]
        inside = path.lstrip("/")
        if number == "0" and not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            found += [_left(directory, *names) for directory in (root / inside, root)]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += [_left(directory, *names) for directory in (root / "memory" / inside, root / "memory")]
    return found


def _left(directory: Path, limit: str, usage: str, cache: str) -> int | None:
    limits, used = _lines(directory / limit), _lines(directory / usage)
    if not limits or not used or not limits[0].strip().isdigit():  # "max": no limit
        return None
    statistics = dict(line.split(maxsplit=1) for line in _lines(directory / "memory.stat") if " " in line)
    return max(0, int(limits[0]) - int(used[0]) + int(statistics.get(cache, 0)))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
