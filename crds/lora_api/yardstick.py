"""The yardstick in an adapter's manifest: what its evaluation losses were measured on and with."""

from pydantic import Field

from lora_api._base import ApiModel
from lora_api.sources import BaseModelSource, Dataset
from lora_api.training import DPO, Quantization

TOKEN_BUDGET = 4096
"""Tokens of an evaluation batch, padding included, where no run says how many."""


class RunYardstick(ApiModel):
    """The parts of a run document that evaluation losses depend on; ``dpo`` only with objective dpo.

    ``token_budget`` are the tokens of a batch. They change a loss by no more than the rounding of its products.

    A manifest has it as it is on the wire, and it is read with ``reading.read``: a manifest with a field of a later
    release stays one that this release understands.
    """

    base_model: BaseModelSource
    dataset: Dataset
    quantization: Quantization
    dpo: DPO | None = None
    token_budget: int = Field(TOKEN_BUDGET, ge=1)
