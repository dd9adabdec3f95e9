"""Which sequences each optimizer step sees."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from lora_api.run import RunSpec


class EpochSampler(Sampler[int]):
    """Order of the sequences in each epoch: a permutation, cut to whole global batches.

    Every optimizer step sees ``global_batch_size`` sequences whatever the number of processes, and the order depends
    on seed and epoch alone, so that a resumed run and a run on another number of nodes see the same batches. Up to
    ``global_batch_size - 1`` sequences are left out of an epoch, other ones each time. Fewer sequences than one global
    batch are repeated to fill it.

    With ``lengths`` (tokens) the sequences of a global batch are sorted, longest first, so that those of one
    micro-batch are about equally long and little is padded, and the ranks' micro-batches take about equally long.
    Which sequences a step sees does not change by that, and so neither does its loss.
    """

    def __init__(self, records: int, global_batch_size: int, seed: int, lengths: Any = None) -> None:
        self.records = records
        self.global_batch_size = global_batch_size
        self.steps = steps_per_epoch(records, global_batch_size)
        """Optimizer steps in an epoch."""
        self.length = self.steps * global_batch_size
        self.seed = seed
        self.epoch = 0
        self.lengths = None if lengths is None else torch.as_tensor(lengths)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, counted from 0. accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.records, generator=generator)
        order = order.repeat(math.ceil(self.length / self.records))[: self.length]
        for batch in order.split(self.global_batch_size):
            if self.lengths is not None:
                batch = batch[torch.argsort(self.lengths[batch], descending=True, stable=True)]
            yield from batch.tolist()


def steps_per_epoch(records: int, global_batch_size: int) -> int:
    """Optimizer steps in one pass over the sequences; at least 1."""
    return max(1, records // global_batch_size)


def total_steps(run: RunSpec, records: int) -> int:
    """Optimizer steps of the whole run, for ``records`` sequences."""
    if run.training.max_steps is not None:
        return run.training.max_steps
    epochs = run.training.epochs or 1.0
    return max(1, round(epochs * steps_per_epoch(records, run.training.global_batch_size)))
