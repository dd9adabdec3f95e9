"""Which process group a tensor goes through: the one of the training device, or that of host memory.

On GPUs they are two. A group with both NCCL and gloo in it cannot be split: DeviceMesh splits a group that is bound to
a device, and hands NCCL's options to gloo as well (torch/distributed/device_mesh.py:564; pytorch#162424, #182057,
#192106). So the default group has NCCL alone, and every mesh is made of it; what is in host memory, such as the JSON
of ``exchange``, has a gloo group of its own. ``devices.Backends`` says which backends these are.
"""

from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

_host: dist.ProcessGroup | None = None


def open_host_group(backend: str | None, timeout: timedelta) -> None:
    """Makes the group for host memory beside the default one; ``None``: the default one takes it. All ranks call it.

    Raises:
        torch.distributed.DistError: the others did not come in time.
    """
    global _host
    _host = None if backend is None else dist.new_group(backend=backend, timeout=timeout, group_desc="host memory")


def host_group() -> dist.ProcessGroup | None:
    """The group for tensors in host memory; ``None`` is torch's name for the default one."""
    return _host


def all_groups() -> Iterator[dist.ProcessGroup]:
    """The groups of all processes."""
    yield dist.distributed_c10d._get_default_group()  # noqa: SLF001 - torch has no public call for it
    if _host is not None:
        yield _host
