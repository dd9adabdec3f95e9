"""Memory of the host as the kernel tells it."""

from pathlib import Path

import pytest

from lora_trainer.hostmemory import available_bytes


def cgroup(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


HOSTS: list[tuple[str, dict[str, str], int | None]] = [
    ("nothing says", {}, None),
    ("the machine alone", {"meminfo": "MemTotal: 9 kB\nMemAvailable: 3 kB\n"}, 3072),
    (
        "a container's limit, version 2, its file cache counted as free",
        {
            "meminfo": "MemAvailable: 999 kB",
            "self": "0::/pod",
            "memory.max": "5000\n",
            "memory.current": "3000\n",
            "memory.stat": "anon 1\ninactive_file 500\n",
        },
        2500,
    ),
    ("no limit, version 2", {"meminfo": "MemAvailable: 1 kB", "self": "0::/", "memory.max": "max"}, 1024),
    (
        "version 1, below the mount",
        {
            "self": "7:cpu:/a\n6:memory:/pod",
            "memory/pod/memory.limit_in_bytes": "700",
            "memory/pod/memory.usage_in_bytes": "800",
        },
        0,
    ),
]


@pytest.mark.parametrize(("files", "wanted"), [row[1:] for row in HOSTS], ids=[row[0] for row in HOSTS])
def test_memory_of_the_host_is_the_least_of_its_limits(tmp_path: Path, files: dict[str, str], wanted: int) -> None:
    root = cgroup(tmp_path, files)
    assert available_bytes(root, root / "self", root / "meminfo") == wanted


def test_this_machine_says_how_much_memory_it_has() -> None:
    assert 0 < (available_bytes() or 0) < 2**50
