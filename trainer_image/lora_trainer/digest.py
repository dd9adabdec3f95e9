"""A 64-bit digest of a tensor's bytes, made on its device at memory's speed: to see that weights have not changed.

The bytes are words of 64 bits in blocks of ``WORDS``. A block's hash is linear: the sum of its words, each times an odd
number of its own, modulo 2**64. That runs at 3 GB/s on one CPU core (``python -m bench.digest``) and at the memory's
speed on a GPU, and nothing is copied to the host. First the upper half of each word is added to its lower half: two
flips of top bits would cancel otherwise, since 2**63 times any odd number is the same. The blocks' hashes are mixed
with their numbers (splitmix64, Steele et al., OOPSLA 2014) and summed.

One flipped bit always changes the hash of its block. Words that change places, and other damage that is not
made on purpose, go unseen about once in 2**64. It is no cryptographic hash: whoever can write weights can write what
they are compared with, too. Integer arithmetic is exact, so that CPU and GPU agree.
"""

from functools import cache

import torch

WORDS = 4096
BLOCK_BYTES = 8 * WORDS
_ROWS_ON_CPU = 64
"""Blocks at a time on a CPU: 2 MiB, which stay in its cache between the steps."""
_ROWS_ON_DEVICE = 2048
"""Blocks at a time elsewhere: a copy of 64 MiB exists meanwhile."""

_STEP = -7046029254386353131  # 2**64 divided by the golden ratio, as a signed number
_FACTORS = (-4658895280553007687, -7723592293110705685)


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """The digest of the bytes of ``tensor``, of any type, in their order: one int64 on its device. Nothing waits."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    size = data.numel()
    full = size // BLOCK_BYTES
    hashes = [_block_hashes(data[: full * BLOCK_BYTES].view(torch.int64).view(full, WORDS))] if full else []
    if rest := data[full * BLOCK_BYTES :].numel():
        last = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=data.device)
        last[:rest] = data[full * BLOCK_BYTES :]
        hashes.append(_block_hashes(last.view(torch.int64).view(1, WORDS)))
    if not hashes:
        return torch.zeros((), dtype=torch.int64, device=data.device)
    found = torch.cat(hashes)
    numbers = torch.arange(1, 1 + len(found), device=data.device)
    return _mixed(_mixed(found + numbers * _STEP).sum() + size)


def combined(digests: list[torch.Tensor]) -> torch.Tensor:
    """One digest of several tensors' in their order, as an int64."""
    if not digests:
        return torch.zeros((), dtype=torch.int64)
    return digest(torch.stack(digests))


def _block_hashes(words: torch.Tensor) -> torch.Tensor:
    """The hash of each row of ``words`` (blocks, ``WORDS``): (blocks,)."""
    on_cpu = words.device.type == "cpu"
    factors = _odd_factors(words.device)
    rows = min(len(words), _ROWS_ON_CPU if on_cpu else _ROWS_ON_DEVICE)
    room = torch.empty_like(words[:rows])  # once: memory that is new to the process costs more than the arithmetic
    found = []
    for some in words.split(rows):
        folded = torch.bitwise_right_shift(some, 32, out=room[: len(some)]).add_(some)
        # torch has the product of an integer matrix and a vector on CPUs alone.
        found.append(folded @ factors if on_cpu else folded.mul_(factors).sum(1))
    return torch.cat(found)


@cache
def _odd_factors(device: torch.device) -> torch.Tensor:
    return (_mixed(torch.arange(1, 1 + WORDS) * _STEP) | 1).to(device)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """splitmix64's last steps: a bijection of 64 bits in which each bit changes half of all."""
    words = (words ^ _shifted(words, 30)) * _FACTORS[0]
    words = (words ^ _shifted(words, 27)) * _FACTORS[1]
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """``words`` to the right, filled up with zeros: torch fills up with the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
