"""Scores of whole records: how many nats they cost, and whether greedy decoding would write them to the letter.

Both come from one forward pass. Greedy decoding takes the first choice at each token, so it writes a record exactly
where every token that is learned is the model's first choice after the ones before it: nothing has to be generated to
know that, which on sharded weights would gather all of them for each token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lora_api.served import Score
from lora_trainer.loss import TokenScores
from lora_trainer.packs import Sequences, collate
from lora_trainer.settings import Place
from lora_trainer.sharding import reshard


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
        outputs: TokenScores = model(**moved, use_cache=False, score_tokens=True)
        if counted:
            found[:, indices] = _sum_up(outputs).cpu()
        if interrupted is not None and interrupted():
            model.train(training)
            reshard(model)
            return None
    model.train(training)
    reshard(model)
    return RecordScores(*_add_up(found, device))


def _sum_up(scores: TokenScores) -> torch.Tensor:
    """Nats, learned tokens, and whether all of these are first choices, of each row: float64 of shape (3, rows)."""
    learned, losses, first = scores.supervised, scores.losses, scores.first
    assert learned is not None and losses is not None and first is not None  # noqa: S101, PT018 - no gradient is wanted
    nats = torch.zeros(learned.shape, device=losses.device).masked_scatter(learned, losses)
    right = torch.ones_like(learned).masked_scatter(learned, first)
    return torch.stack([nats.double().sum(1), learned.double().sum(1), right.all(1).double()])


def _add_up(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not dist.is_initialized():
        return values
    placed = values.to(device)
    dist.all_reduce(placed)
    return placed.cpu()
