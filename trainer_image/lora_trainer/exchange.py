"""Small values between the processes of a gang: JSON in tensors of bytes.

torch's own calls for it (``all_gather_object``, ``broadcast_object_list``) unpickle what peers send, and a pickle runs
what its writer wants. JSON is only read. Its length comes first and is bounded, so no peer can make the others take
more than they have room for. The tensors are in host memory, and go through its group (``groups``).
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from lora_trainer.errors import InternalError
from lora_trainer.groups import host_group

MAX_BYTES = 16 * 2**20
"""The most that one rank may say at once. The list of the files of ten checkpoints of 512 processes is 1 MiB."""


def gather_json(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank, by rank. A collective operation: all ranks call it.

    Alone too, a value comes back as JSON has it: a tuple as a list.

    Raises:
        InternalError: on all ranks; what a rank says is longer than MAX_BYTES, or no JSON.
    """
    return [_parse(data, rank) for rank, data in enumerate(gather_bytes(json.dumps(value).encode()))]


def broadcast_json(value: Any) -> Any:
    """Rank 0's ``value``, on every rank. A collective operation: all ranks call it; the others' values do not count.

    Raises:
        InternalError: on all ranks; what rank 0 says is longer than MAX_BYTES, or no JSON.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    return _parse(broadcast_bytes(json.dumps(value).encode() if is_main else b""), 0)


def gather_bytes(mine: bytes) -> list[bytes]:
    """As ``gather_json``, for bytes; at least one."""
    if not dist.is_initialized():
        return [mine]
    lengths = [int(length) for length in _all_gather(torch.tensor([len(mine)]))]
    for rank, length in enumerate(lengths):
        _check_length(length, rank)
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(mine)] = _to_tensor(mine)
    parts = zip(_all_gather(padded), lengths, strict=True)
    return [part[:length].numpy().tobytes() for part, length in parts]


def broadcast_bytes(mine: bytes) -> bytes:
    """As ``broadcast_json``, for bytes; at least one."""
    if not dist.is_initialized():
        return mine
    length = torch.tensor([len(mine)])
    dist.broadcast(length, src=0, group=host_group())
    _check_length(int(length), 0)
    data = _to_tensor(mine) if dist.get_rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=host_group())
    return data.numpy().tobytes()


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor, group=host_group())
    return parts


def _check_length(length: int, rank: int) -> None:
    if not 0 < length <= MAX_BYTES:
        raise InternalError(f"rank {rank} has {length:,} bytes for the others; it may say 1 to {MAX_BYTES:,} at once")


def _parse(data: bytes, rank: int) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InternalError(f"what rank {rank} said to the others is no JSON: {error}") from error


def _to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
