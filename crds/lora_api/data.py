"""What the records of a run are, in numbers: preflight plans with them, and the published report shows them."""

from typing import Self

from pydantic import Field, model_validator

from lora_api._base import RecordModel


class LengthHistogram(RecordModel):
    """How long the training records are, in tokens, before they are cut.

    ``counts[i]`` records have more than ``bounds[i - 1]`` and at most ``bounds[i]`` tokens. The last count has no
    upper bound, so there is one count more than there are bounds.
    """

    bounds: list[int] = []
    counts: list[int] = [0]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError("a histogram has one count more than it has bounds")
        return self


class DataReport(RecordModel):
    """The training records as tokens, after they were cut at maxSeqLength.

    ``tokens`` are those of one epoch and ``supervised_tokens`` the part of them that is learned. ``longest`` is a
    record's length before it is cut. ``lost_token_share`` (0 to 1) is of all tokens that the records have.
    ``dropped_records`` have nothing left to learn once they are cut, and are in none of the other numbers but in
    ``lost_token_share``, ``longest`` and the histogram. ``sequences`` are what globalBatchSize counts: the records, or
    with packing the filled sequences. Of both sides are ``doubled_bos``, the records from which a second beginning of
    text was taken away, and ``leaked_records``, those evaluation records whose tokens a training record has too.
    """

    train_records: int = Field(ge=0)
    eval_records: int = Field(0, ge=0)
    tokens: int = Field(ge=0)
    supervised_tokens: int = Field(ge=0)
    sequences: int = Field(ge=0)
    longest: int = Field(0, ge=0)
    truncated_records: int = Field(0, ge=0)
    lost_token_share: float = Field(0.0, ge=0.0, le=1.0)
    dropped_records: int = Field(0, ge=0)
    doubled_bos: int = Field(0, ge=0)
    leaked_records: int = Field(0, ge=0)
    histogram: LengthHistogram = Field(default_factory=LengthHistogram)

    def to_text(self) -> str:
        """The report for people, in one line."""
        packed = f" in {self.sequences:,} packed sequences" if self.sequences != self.train_records else ""
        parts = [
            f"{self.train_records:,} records to train on{packed}, {self.eval_records:,} to evaluate on",
            f"{self.tokens:,} tokens an epoch, {self.supervised_tokens:,} of them learned",
            f"the longest record has {self.longest:,}",
        ]
        if self.truncated_records:
            parts.append(f"{self.truncated_records:,} cut at maxSeqLength, {self.lost_token_share:.2%} of tokens lost")
        if self.dropped_records:
            parts.append(f"{self.dropped_records:,} dropped: nothing to learn is left of them")
        return "; ".join(parts)

    @property
    def warnings(self) -> list[str]:
        """What is not wrong and yet not as it seems, a sentence each, with its remedy."""
        found = []
        if self.leaked_records:
            found.append(
                f"dataset: {self.leaked_records:,} of {self.eval_records:,} evaluation records are also training "
                "records, so the evaluation loss is too good to be true; take them out of one of the two"
            )
        if self.doubled_bos:
            found.append(
                f"dataset: {self.doubled_bos:,} records have a beginning-of-text token (BOS) of their own beside that "
                "of the tokenizer or the chat template; one was taken away. Prompts to the served model must have one, "
                "too: send them without it"
            )
        return found
