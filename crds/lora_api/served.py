"""How an adapter does on its base model as it is served: unquantized, where it was trained on a quantized one."""

from pydantic import Field

from lora_api._base import Measure, RecordModel, ShortMessage


class Score(RecordModel):
    """What an evaluation came to.

    ``loss`` is in nats per token; of preference pairs, it is the loss of DPO. ``share`` is that of the records of which
    every token that is learned is the model's first choice: greedy decoding writes exactly those to the letter. Of
    preference pairs it is that of the pairs whose chosen answer has the larger reward.
    """

    loss: Measure = Field(None, description="Evaluation loss.")
    share: Measure = Field(None, description="Share of the records that are right, 0 to 1.")


class ServedEvaluation(RecordModel):
    """The adapter on the unquantized base model in ``dtype``. Where that was not measured, ``problem`` says why.

    All scores are of the same ``records``, out of ``all_records``. ``training`` is the score after training on the base
    that was trained on: its difference from ``after`` is what the adapter has learned of the quantization.
    """

    dtype: str = Field(description="Type of the base weights.")
    records: int = Field(0, ge=0, description="Records that were measured.")
    all_records: int = Field(0, ge=0, description="Records that there are.")
    before: Score = Field(default_factory=Score, description="The base model as served.")
    after: Score = Field(default_factory=Score, description="The adapter on it.")
    training: Score = Field(default_factory=Score, description="The adapter on the base model that was trained on.")
    same_base: bool = Field(
        default=False,
        description="Both base models are the same, and are measured once.",
    )
    problem: ShortMessage | None = Field(None, description="Why it was not measured.")

    @property
    def is_measured(self) -> bool:
        """Whether there are figures."""
        return self.problem is None and self.after.loss is not None

    def describe_records(self) -> str:
        """How many records, for people."""
        some = f"{self.records} of " if self.records < self.all_records else ""
        return f"{some}{self.all_records} records"
