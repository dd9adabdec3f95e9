"""lora.newTokens on the model's side: rows of embedding and output head that learn, while all others stay frozen.

What a row has gained is kept apart from the frozen weights, as an adapter is: in float32, and whole on every process,
since a few rows are less than one layer's norm. It is published as a LoRA pair of the embedding and one of the head, in
which one matrix picks the rows and the other holds what they have gained: the form that PEFT and vLLM load.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from lora_trainer.errors import BadSpecError, InternalError
from lora_trainer.loading import Part, local_part

if TYPE_CHECKING:
    from lora_trainer.newtokens import NewTokens

Tensors = dict[str, torch.Tensor]


class EmbeddingRows(nn.Module):
    """An embedding whose rows ``ids`` are what the frozen ``base`` has there, plus ``rows`` (tokens, hidden size)."""

    ids: torch.Tensor
    slots: torch.Tensor

    def __init__(self, base: nn.Embedding, ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        slots = torch.zeros(base.num_embeddings, dtype=torch.int64, device=ids.device)
        slots[ids] = torch.arange(1, len(ids) + 1, device=ids.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that asks for its type and place."""
        return self.base.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., hidden size) of ``tokens``. Gemma 3 scales them inside of its embedding."""
        found: torch.Tensor = self.base(tokens)
        table = torch.cat([torch.zeros_like(self.rows[:1]), self.rows])
        gained = nn.functional.embedding(self.slots[tokens], table)
        scale = getattr(self.base, "embed_scale", None)
        return found + (gained if scale is None else gained * scale).to(found.dtype)


class HeadRows(nn.Module):
    """An output head whose rows ``ids`` are what the frozen ``base`` has there, plus ``rows`` (tokens, hidden size)."""

    ids: torch.Tensor

    def __init__(self, base: nn.Linear, ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.register_buffer("ids", ids, persistent=False)

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight with its learned rows, whole: a copy. For losses that take the weight and not the head (TRL's)."""
        weight = whole(self.base.weight)
        return weight.index_add(0, self.ids, self.rows.to(weight.dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary)."""
        logits: torch.Tensor = self.base(hidden)
        gained = nn.functional.linear(hidden, self.rows.to(hidden.dtype))
        return logits.index_add(-1, self.ids, gained.to(logits.dtype))


KINDS = (EmbeddingRows, HeadRows)


@dataclass(frozen=True)
class Learned:
    """Where rows learn: the two modules and their names in the model."""

    embedding_name: str
    embedding: EmbeddingRows
    head_name: str
    head: HeadRows

    @property
    def ids(self) -> list[int]:
        """The rows."""
        return [int(number) for number in self.embedding.ids.tolist()]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of ``row_tensors``."""
        tokens, hidden = self.embedding.rows.shape
        vocabulary = self.embedding.base.num_embeddings
        return {
            f"{self.embedding_name}.lora_embedding_A": (tokens, vocabulary),
            f"{self.embedding_name}.lora_embedding_B": (hidden, tokens),
            f"{self.head_name}.lora_A.weight": (tokens, hidden),
            f"{self.head_name}.lora_B.weight": (vocabulary, tokens),
        }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a weight that may be sharded. A collective operation where it is: all ranks call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def add_rows(model: PeftModel, tokens: "NewTokens", part: Part | None = None) -> None:
    """Lets the rows of ``tokens`` learn, in embedding and output head; tied, they are the same rows. All ranks call it.

    ``part`` is what this process holds of each weight. A token that was added begins as the mean of all rows (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models"), a reserved one as it is.

    Raises:
        BadSpecError: the model has no plain embedding and head.
    """
    if not tokens.ids:
        return
    inner: Any = model.get_base_model()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    check_has_rows(inner)
    ids = torch.tensor(tokens.ids, device=embedding.weight.device)
    rows = nn.Parameter(start_rows(embedding.weight, tokens, part))
    head_rows = rows if head.weight is embedding.weight else nn.Parameter(start_rows(head.weight, tokens, part))
    _replace(inner, embedding, EmbeddingRows(embedding, ids, rows))
    _replace(inner, head, HeadRows(head, ids, head_rows))


def check_has_rows(model: Any) -> None:
    """Raises BadSpecError unless ``model`` has a plain embedding and head, of which a row is a token's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise BadSpecError(
            f"lora.newTokens: {type(model).__name__} has a {type(embedding).__name__} as embedding and a "
            f"{type(head).__name__} as output head, whose rows cannot be trained one by one; leave newTokens out"
        )


def start_rows(weight: nn.Parameter, tokens: "NewTokens", part: Part | None) -> torch.Tensor:
    """What the rows of ``tokens`` begin with, over what ``weight`` has there: (tokens, hidden size), float32.

    Sums are taken over all processes. Rows that several of them hold are held equally often by each other.
    """
    held = local_part(weight)
    cut = part is not None and held is not None
    mine = weight.data if held is None else held
    first = part.first(len(weight)) if part is not None and cut else 0
    sums = torch.zeros(len(tokens.ids) + 1, mine.shape[1] + 1, device=weight.device)
    sums[-1, :-1], sums[-1, -1] = mine.sum(0, dtype=torch.float32), len(mine)
    for place, number in enumerate(tokens.ids):
        if first <= number < first + len(mine):
            sums[place, :-1], sums[place, -1] = mine[number - first], 1
    if cut and dist.is_initialized():
        dist.all_reduce(sums)
    values = sums[:, :-1] / sums[:, -1:]
    added = torch.tensor([[float(number in tokens.added)] for number in tokens.ids], device=weight.device)
    return (values[-1] - values[:-1]) * added


def _replace(model: nn.Module, module: nn.Module, by: nn.Module) -> None:
    name = next(name for name, found in model.named_modules() if found is module)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, by)


def find_rows(model: nn.Module) -> Learned | None:
    """Where rows of ``model`` learn, or ``None``."""
    embeddings = [(name, module) for name, module in model.named_modules() if isinstance(module, EmbeddingRows)]
    heads = [(name, module) for name, module in model.named_modules() if isinstance(module, HeadRows)]
    return Learned(*embeddings[0], *heads[0]) if embeddings and heads else None


def frozen_weight(module: nn.Module) -> torch.Tensor:
    """The frozen weight of an embedding or head, with or without rows that learn."""
    weight = (module.base if isinstance(module, KINDS) else module).weight
    assert isinstance(weight, torch.Tensor)  # noqa: S101 - for the type checker
    return weight


def row_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that hold learned rows."""
    return {module.rows for module in model.modules() if isinstance(module, KINDS)}


# -- as files


def row_tensors(learned: Learned) -> Tensors:
    """The learned rows as two LoRA pairs, by PEFT's names, with a scale of 1 and as many ranks as there are tokens.

    Embedding: A (tokens, vocabulary) picks rows, B (hidden size, tokens) is what they gained. Head: A (tokens, hidden
    size) is what they gained, B (vocabulary, tokens) picks them. One of the two may have gained nothing: a token that
    ends every answer is never read, and one that stands in questions alone is seldom to be written.

    Raises:
        InternalError: a value is not finite, or nothing was learned.
    """
    gained = (learned.embedding.rows, learned.head.rows)
    if not all(bool(torch.isfinite(rows).all()) for rows in gained) or not any(bool(rows.any()) for rows in gained):
        raise InternalError("the rows of lora.newTokens are zero or not finite: they were not trained")
    ids = learned.embedding.ids.cpu()
    pick = torch.zeros(len(ids), learned.embedding.base.num_embeddings)
    pick[torch.arange(len(ids)), ids] = 1.0
    embedding, head = (rows.detach().to("cpu", torch.float32, copy=True) for rows in gained)
    return {
        f"{learned.embedding_name}.lora_embedding_A": pick,
        f"{learned.embedding_name}.lora_embedding_B": embedding.T.contiguous(),
        f"{learned.head_name}.lora_A.weight": head,
        f"{learned.head_name}.lora_B.weight": pick.T.contiguous(),
    }


def read_rows(learned: Learned, tensors: Mapping[str, torch.Tensor], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What published ``tensors`` add to the rows of embedding and head: two of (tokens, hidden size), float32.

    Raises:
        InternalError: they are missing, or change other rows.
    """
    e, h, ids = learned.embedding_name, learned.head_name, learned.ids
    try:
        embedding = (tensors[f"{e}.lora_embedding_B"] @ tensors[f"{e}.lora_embedding_A"]).T * scale
        head = tensors[f"{h}.lora_B.weight"] @ tensors[f"{h}.lora_A.weight"] * scale
    except KeyError as missing:
        raise InternalError(f"the adapter in the store has no {missing.args[0]}") from missing
    for change in (embedding, head):
        if int(change.any(1).sum()) > int(change[ids].any(1).sum()):
            raise InternalError("the adapter in the store changes other rows than those of lora.newTokens")
    return embedding[ids], head[ids]


def merge_rows(model: PeftModel) -> None:
    """Puts published rows into the weights of embedding and head, for losses that take a weight and not its module.

    PEFT has loaded them as adapters of both. Tied, the weight is one and gets them once.
    """
    inner: Any = model.get_base_model()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if not isinstance(embedding, LoraLayer):
        return
    tied = embedding.get_base_layer().weight is head.get_base_layer().weight
    embedding.merge()
    if tied:
        head.enable_adapters(enabled=False)
    else:
        head.merge()
