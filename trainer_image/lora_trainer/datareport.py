"""What is said of the records of a run: kept for each of them while they are read, and counted once all are."""

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_api.data import DataReport, LengthHistogram
from lora_trainer.tokenfile import TokenFile


@dataclass
class Side:
    """What is kept in memory of each record of one file of tokens, in its order; of dropped ones apart.

    ``contents`` are hashes of what is left of them (``tokens.Document.content``).
    """

    whole: "array[int]" = field(default_factory=lambda: array("i"))
    learned: "array[int]" = field(default_factory=lambda: array("i"))
    contents: "array[int]" = field(default_factory=lambda: array("Q"))
    doubled_bos: int = 0
    dropped_whole: "array[int]" = field(default_factory=lambda: array("i"))
    dropped_places: "array[float]" = field(default_factory=lambda: array("d"))


def report_on_data(tokens: TokenFile, side: Side, limit: float, held_out: NDArray[np.uint64]) -> DataReport:
    """The report on the records that are trained on, those at or above ``limit``.

    ``held_out`` has the hashes of the evaluation records.
    """
    chosen = tokens.places >= limit
    whole = np.asarray(side.whole, dtype=np.int64)[chosen]
    dropped = np.asarray(side.dropped_whole, dtype=np.int64)[np.asarray(side.dropped_places) >= limit]
    kept = tokens.lengths[chosen].astype(np.int64)
    lengths = np.concatenate([whole, dropped])
    total, left = int(lengths.sum()), int(kept.sum())
    return DataReport(
        train_records=len(kept),
        eval_records=len(held_out),
        leaked_records=int(np.isin(held_out, np.asarray(side.contents)[chosen]).sum()),
        tokens=left,
        supervised_tokens=int(np.asarray(side.learned, dtype=np.int64)[chosen].sum()),
        sequences=len(kept),
        longest=int(lengths.max(initial=0)),
        truncated_records=int((whole > kept).sum()),
        lost_token_share=(total - left) / total if total else 0.0,
        dropped_records=len(dropped),
        histogram=build_histogram(lengths),
    )


def build_histogram(lengths: NDArray[np.int64]) -> LengthHistogram:
    """Lengths (tokens) in steps of powers of two, from 16 up to what holds the longest."""
    bounds = [16]
    while bounds[-1] < int(lengths.max(initial=0)):
        bounds.append(bounds[-1] * 2)
    counts = np.bincount(np.searchsorted(bounds, lengths, "left"), minlength=len(bounds) + 1)
    return LengthHistogram(bounds=bounds, counts=counts.tolist())
