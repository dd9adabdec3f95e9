"""Sequences of one or many documents, and micro-batches of them, without attention across documents."""

import bisect
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lora_trainer.errors import BadSpecError
from lora_trainer.loss import IGNORED
from lora_trainer.tokens import Document
from lora_trainer.varlen import VARLEN

WINDOW = 4096
"""Documents that are packed with each other. More waste less, and take longer: at 4096 under 1% is left empty."""

Batch = dict[str, torch.Tensor]
Layout = Literal["padded", "packed", "flat"]
"""padded: a document a row, with an attention mask. packed: documents one after the other in each row. flat: all of a
micro-batch in one row, which attention kernels for sequences of different lengths take without padding."""


class Documents(Protocol):
    """Many documents, by number."""

    lengths: NDArray[np.int32]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


class Sequences(Dataset[list[Document]]):
    """What globalBatchSize counts: documents, or packs of them."""

    def __init__(self, documents: Documents, order: NDArray[np.int64], bounds: NDArray[np.int64] | None = None) -> None:
        """Sequence i has the documents ``order[bounds[i]:bounds[i + 1]]``; without ``bounds`` ``order[i]`` alone."""
        self._documents, self._order = documents, order
        self._bounds = np.arange(len(order) + 1) if bounds is None else bounds
        self.packed = bounds is not None
        sums = np.concatenate([[0], np.cumsum(documents.lengths[order], dtype=np.int64)])
        self.lengths: NDArray[np.int64] = np.diff(sums[self._bounds])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> list[Document]:
        """The documents of a sequence."""
        return [self._documents[int(number)] for number in self._order[self._bounds[index] : self._bounds[index + 1]]]


def pack(
    lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int, seed: int, window: int = WINDOW
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``order`` in packs of at most ``capacity`` tokens, as the order and bounds of Sequences.

    Best fit decreasing (Johnson 1973) within windows of a permutation that depends on ``seed`` alone, so that what
    is packed together is a random choice, and the time grows with the number of documents only. No document is split.
    """
    permuted = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).numpy()]
    packs: list[list[int]] = []
    for start in range(0, len(permuted), window):
        packs += _best_fit(lengths, permuted[start : start + window], capacity)
    flat = np.fromiter((number for each in packs for number in each), dtype=np.int64, count=len(permuted))
    return flat, np.cumsum([0, *map(len, packs)], dtype=np.int64)


def _best_fit(lengths: NDArray[np.int32], numbers: NDArray[np.int64], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # what is left in each open pack, and its number, in that order
    for number in numbers[np.argsort(-lengths[numbers].astype(np.int64), kind="stable")]:
        length = int(lengths[number])
        place = bisect.bisect_left(spaces, (length, -1))
        if place == len(spaces):
            packs.append([])
            left, chosen = capacity, len(packs) - 1
        else:
            left, chosen = spaces.pop(place)
        packs[chosen].append(int(number))
        if left > length:
            bisect.insort(spaces, (left - length, chosen))
    return packs


def choose_layout(attention: str, *, packed: bool) -> Layout:
    """The layout for an attention implementation of transformers, by its name.

    Only FlashAttention takes one long row without computing what it masks; others would pay its square. PyTorch's copy
    of it is taken for packed rows; documents that have a row each go to SDPA, as they do without it.
    """
    if "flash" in attention or (attention == VARLEN and packed):
        return "flat"
    return "packed" if packed else "padded"


def collate(sequences: Sequence[list[Document]], layout: Layout, pad_token: int) -> Batch:
    """A micro-batch: input_ids and labels, int64 of shape (rows, longest row), and what keeps documents apart.

    padded: attention_mask. packed and flat: position_ids, which begin again at 0 with each document; transformers makes
    a block-diagonal causal mask of them as long as there is no attention mask (masking_utils). Padding at the end of
    a packed row is a document of its own, from which nothing is learned. flat: cu_seq_lens and max_length as well, so
    that no layer has to find them again. The first token of a document is never learned, so no loss crosses a border.
    """
    rows = [[document for sequence in sequences for document in sequence]] if layout == "flat" else list(sequences)
    width = max(sum(len(document.ids) for document in row) for row in rows)
    ids = np.full((len(rows), width), pad_token, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        end = 0
        for document in row:
            start, end = end, end + len(document.ids)
            ids[number, start:end] = document.ids
            labels[number, start:end] = document.labels()
            positions[number, start:end] = np.arange(end - start)
        positions[number, end:] = np.arange(width - end)
        mask[number, :end] = 1
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if layout == "padded":
        return batch | {"attention_mask": torch.from_numpy(mask)}
    batch["position_ids"] = torch.from_numpy(positions)
    return batch


def flash_arguments(batch: Batch) -> dict[str, torch.Tensor | int]:
    """Where documents begin in a flat batch, as FlashAttention's kernels for different lengths take it."""
    starts = torch.nonzero(batch["position_ids"][0] == 0).flatten().to(torch.int32)
    bounds = torch.cat([starts, starts.new_tensor([batch["position_ids"].shape[1]])])
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def check_isolation(model: torch.nn.Module, layout: Layout, vocabulary: int, device: torch.device) -> None:
    """Proves on the model itself that a document does not see the one before it in its row.

    The second document's logits must not change with the first one. How much they would change if it were seen is
    measured too, so that the bound needs no scale of its own.

    Raises:
        BadSpecError: it does; some architectures (state space models, linear attention) carry a state along the row.
    """
    if layout == "padded":
        return
    length = 8
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (2, 2 * length), generator=generator)
    tokens[1, length:] = tokens[0, length:]
    apart = torch.arange(length).repeat(2).unsqueeze(0)
    together = torch.arange(2 * length).unsqueeze(0)

    def second(row: int, positions: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": tokens[row : row + 1], "position_ids": positions}
        more = flash_arguments(batch) if layout == "flat" else {}
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in
                 {**batch, **more}.items()}  # fmt: skip
        logits: torch.Tensor = model(**moved, use_cache=False).logits[:, length:]
        return logits.float()

    training = model.training
    model.eval()
    seen = float((second(0, together) - second(1, together)).abs().max())
    leaked = float((second(0, apart) - second(1, apart)).abs().max())
    model.train(training)
    if leaked > 0.05 * seen:
        raise BadSpecError(
            "dataset.packing: this model sees the other records of a packed sequence (its attention, or a state that "
            "it carries along, crosses their borders); turn packing off"
        )
