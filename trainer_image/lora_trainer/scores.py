"""Scores of whole records: how many nats they cost, and whether greedy decoding would write them to the letter.

Both come from one forward pass. Greedy decoding takes the first choice at each token, so it writes a record exactly
where every token that is learned is the model's first choice after the ones before it: nothing has to be generated to
know that, which on sharded weights would gather all of them for each token.
"""

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lora_api.served import Score
from lora_trainer.loss import CHUNK_BYTES, IGNORED, MIN_CHUNK, LogitTransform, logit_transform
from lora_trainer.packs import Sequences, collate
from lora_trainer.rows import HeadRows, whole
from lora_trainer.settings import Place
from lora_trainer.sharding import reshard


@dataclass
class TokenScores(ModelOutput):
    """What a model gives that is called with ``token_scores=True``, each of shape (rows, tokens - 1).

    ``nats``: -log p of the next token, float32, 0 where nothing is learned. ``learned``: whether something is.
    ``first``: whether the next token is the model's first choice, or nothing is learned of it.
    """

    nats: torch.Tensor | None = None
    first: torch.Tensor | None = None
    learned: torch.Tensor | None = None


@dataclass(frozen=True)
class RecordScores:
    """What each record of a dataset came to, float64 of shape (records,), in their order and on all ranks alike.

    ``exact`` is 1 where every learned token is the model's first choice, else 0.
    """

    nats: torch.Tensor
    tokens: torch.Tensor
    exact: torch.Tensor

    def score(self, numbers: Sequence[int] | None = None) -> Score:
        """Nats per token, and share of exact records, of the records ``numbers``; ``None``: of all."""
        chosen = torch.arange(len(self.nats)) if numbers is None else torch.tensor(list(numbers), dtype=torch.int64)
        tokens = max(float(self.tokens[chosen].sum()), 1.0)
        loss = float(self.nats[chosen].sum()) / tokens
        return Score(loss=loss, share=float(self.exact[chosen].mean()) if len(chosen) else None)


def add_token_scores(model: PreTrainedModel) -> None:
    """Lets ``model(..., labels=..., token_scores=True)`` return TokenScores. All other calls stay as they are.

    The call has to go through the whole model, in which FSDP2 gathers the head's weight. Logits exist in chunks only,
    but for a family whose settings are not known here: its own forward pass makes them then.
    """
    if getattr(model, "gives_token_scores", False):
        return
    transform = logit_transform(model.config)
    inner = model.forward

    @functools.wraps(inner)
    def forward(self: PreTrainedModel, *args: Any, token_scores: bool = False, **kwargs: Any) -> Any:
        if not token_scores:
            return inner(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        learned = labels != IGNORED
        if transform is None:
            logits = inner(*args, **kwargs).logits[:, :-1][learned]
            nats, first = score_tokens(lambda part: logits[part], labels[learned], logits.shape[1])
        else:
            hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1][learned]
            head = self.get_output_embeddings()
            frozen = head.base if isinstance(head, HeadRows) else head
            nats, first = score_tokens(
                functools.partial(_logits, hidden, head, transform), labels[learned], frozen.weight.shape[0]
            )
        return TokenScores(
            nats=torch.zeros(labels.shape, device=nats.device).masked_scatter(learned, nats),
            first=torch.ones_like(learned).masked_scatter(learned, first),
            learned=learned,
        )

    model.forward = types.MethodType(forward, model)
    model.gives_token_scores = True


def _logits(hidden: torch.Tensor, head: Any, transform: LogitTransform, part: slice) -> torch.Tensor:
    """The logits of a chunk, (tokens, vocabulary), in the type of the head's input."""
    frozen = head.base if isinstance(head, HeadRows) else head
    given, weight = hidden[part], whole(frozen.weight)
    bias = None if frozen.bias is None else whole(frozen.bias).to(given.dtype)
    logits = torch.nn.functional.linear(given, weight.to(given.dtype), bias)
    if isinstance(head, HeadRows):
        logits.index_add_(1, head.ids, given @ head.rows.to(given.dtype).T)
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    return logits


def score_tokens(
    logits_of: Callable[[slice], torch.Tensor], labels: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of each of ``labels`` in nats, float32, and whether it is the first choice: both of shape (tokens,).

    ``logits_of`` gives the logits of a chunk of the tokens, (chunk, vocabulary).
    """
    nats, first = labels.new_zeros(len(labels), dtype=torch.float32), torch.zeros_like(labels, dtype=torch.bool)
    chunk = max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        logits = logits_of(part).float()
        wanted = labels[part, None]
        nats[part] = logits.logsumexp(dim=1) - logits.gather(1, wanted).squeeze(1)
        first[part] = logits.argmax(dim=1) == wanted.squeeze(1)
    return nats, first


@torch.no_grad()
def score_records(
    model: torch.nn.Module,
    dataset: Sequences,
    batches: Sequence[Sequence[int]],
    pad_token: int,
    place: Place,
    device: torch.device,
    interrupted: Callable[[], bool] | None = None,
) -> RecordScores | None:
    """Scores of each record of ``dataset``, which are spread over ``batches`` by number. All ranks call it.

    Each rank takes every ``world_size``-th batch, and the results are added up, so that they do not depend on the
    number of processes. With sharded weights all ranks must run equally many forward passes: a rank that has none left
    repeats the first batch and does not count it. ``None`` where ``interrupted``, which all ranks ask after each batch,
    said so.
    """
    found = torch.zeros(3, len(dataset), dtype=torch.float64)
    training = model.training
    model.eval()
    for turn in range(-(-len(batches) // place.world_size)):
        number = turn * place.world_size + place.rank
        counted = number < len(batches)
        indices = list(batches[number if counted else 0])
        batch = collate([dataset[index] for index in indices], "padded", pad_token)
        moved = {name: value.to(device) for name, value in batch.items()}
        outputs: TokenScores = model(**moved, use_cache=False, token_scores=True)
        if counted:
            assert outputs.nats is not None and outputs.first is not None and outputs.learned is not None  # noqa: S101, PT018
            rows = [outputs.nats.double().sum(1), outputs.learned.double().sum(1), outputs.first.all(1).double()]
            found[:, indices] = torch.stack(rows).cpu()
        if interrupted is not None and interrupted():
            model.train(training)
            reshard(model)
            return None
    model.train(training)
    reshard(model)
    return RecordScores(*_add_up(found, device))


def _add_up(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not dist.is_initialized():
        return values
    placed = values.to(device)
    dist.all_reduce(placed)
    return placed.cpu()
