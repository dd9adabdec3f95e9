"""Proof of bits: the packed weights that a run computes with are those that were loaded, on every rank.

When the model is loaded each rank digests the part of each packed weight that it keeps, and the constants that go with
it. Then the gathered weights are looked at as the matrix products will see them:

- before the first step, at the start and after each resume: nothing is trained on weights that sharding has changed;
- at the end, before anything is published: no adapter goes out that learned on weights that changed meanwhile.

Before each checkpoint every rank looks at its own shards alone, which gathers nothing. So no checkpoint holds what was
learned on broken shards, and a run that ends here may go on from its last one. Rounds of evaluation in between prove
nothing by themselves: what trains, what measures and what compares would all see the same altered weights.

A gathered weight is digested part by part, as it was cut, and the parts are compared with what each rank had digested.
So the ranks exchange one number for each weight, once, and a finding names the rank whose part is wrong.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lora_trainer.digest import combined, digest
from lora_trainer.errors import WeightsChangedError
from lora_trainer.exchange import gather_json
from lora_trainer.packed import Packed, find_packed
from lora_trainer.strategy import Strategy

MAX_NAMED = 3
"""Weights that a message names; the rest are counted."""


@dataclass(frozen=True)
class Proof:
    """What was loaded, on this rank: of each of ``weights`` the digest of this rank's part, and of its constants."""

    weights: list[Packed]
    parts: list[int]
    constants: list[int]
    strategy: Strategy
    rank: int

    def check_gathered(self, model: nn.Module) -> None:
        """Gathers all packed weights as a forward pass does, one FSDP group at a time. All ranks call it.

        Raises:
            WeightsChangedError: on all ranks; a gathered weight, or what unpacks it, is not what was loaded.
        """
        shards, first = self.strategy.shards, self.rank - self.strategy.part(self.rank)
        loaded = gather_json(self.parts)[first : first + shards]
        expected = [list(one) for one in zip(*loaded, strict=True)] if self.weights else []
        found = [one.tolist() for one in self._digest_gathered(model, shards)]
        wrong = [
            (weight.name, first + part)
            for weight, want, have in zip(self.weights, expected, found, strict=True)
            for part in range(shards)
            if want[part] != have[part]
        ]
        self._raise_together(wrong)

    def check_shards(self) -> None:
        """Looks at what this rank holds, without gathering anything. All ranks call it.

        Raises:
            WeightsChangedError: on all ranks; what a rank holds is not what it loaded.
        """
        found = _values(digest(weight.here) for weight in self.weights)
        changed = zip(self.weights, self.parts, found, strict=True)
        self._raise_together([(weight.name, self.rank) for weight, want, have in changed if want != have])

    def _digest_gathered(self, model: nn.Module, shards: int) -> list[torch.Tensor]:
        """Digests of the parts of each whole weight: (shards,) each, on the device. Gathers and puts back."""
        found = {id(weight): _digest_parts(weight, shards) for weight in self.weights if weight.is_whole}
        groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for group in reversed(groups):  # the inner ones first: of nested groups, those hold the weights
            inside = set(group.modules())
            mine = [weight for weight in self.weights if id(weight) not in found and weight.module in inside]
            if mine:
                group.unshard()
                found.update((id(weight), _digest_parts(weight, shards)) for weight in mine)
                group.reshard()
        return [found[id(weight)] for weight in self.weights]

    def _raise_together(self, wrong: list[tuple[str, int]]) -> None:
        """``wrong`` has weights and the ranks whose part of them it is, as seen here."""
        constants = _values(combined([digest(one) for one in weight.constants]) for weight in self.weights)
        changed = zip(self.weights, self.constants, constants, strict=True)
        wrong += [(f"{weight.name} (constants)", self.rank) for weight, want, have in changed if want != have]
        seen = gather_json([len(wrong), wrong[:MAX_NAMED]])
        if any(count for count, _ in seen):
            raise WeightsChangedError(_describe(seen))


def take_proof(model: nn.Module, strategy: Strategy, rank: int) -> Proof:
    """Digests what this rank has just loaded of ``model``, before it is spread."""
    weights = find_packed(model)
    return Proof(
        weights=weights,
        parts=_values(digest(weight.here) for weight in weights),
        constants=_values(combined([digest(one) for one in weight.constants]) for weight in weights),
        strategy=strategy,
        rank=rank,
    )


def _digest_parts(weight: Packed, shards: int) -> torch.Tensor:
    """Digests of the parts of a weight that is whole here: one for each rank that holds one, in their order."""
    whole = weight.parameter.data
    cut = torch.chunk(whole, shards)
    return torch.stack([digest(cut[part] if part < len(cut) else whole[:0]) for part in range(shards)])


def _values(digests: Iterable[torch.Tensor]) -> list[int]:
    """Their numbers, with one wait for the device where they lie."""
    found = list(digests)
    return [int(value) for value in torch.stack(found).tolist()] if found else []


def _describe(seen: list[Any]) -> str:
    """``seen`` has of each rank how many parts it found changed, and the first of them."""
    named = sorted({(name, owner) for _, wrong in seen for name, owner in wrong})
    text = ", ".join(f"{name} of rank {owner}" for name, owner in named[:MAX_NAMED])
    most = max(count for count, _ in seen)
    more = f" and {most - MAX_NAMED} more" if most > MAX_NAMED else ""
    ranks = ", ".join(str(rank) for rank, (count, _) in enumerate(seen) if count)
    return f"packed weights are not those that were loaded: {text}{more}, as seen by rank {ranks}"
