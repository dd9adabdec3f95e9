"""Parts of the trainer that need torch, but no training."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_api.run import RunSpec
from lora_trainer.adapter import check_adapter
from lora_trainer.errors import DivergedError, InternalError
from lora_trainer.evaluate import Evaluator, make_batches, question, sample_questions
from lora_trainer.rng import read_rng_state, restore_rng_state
from lora_trainer.sampler import EpochSampler, total_steps
from lora_trainer.scores import RecordScores
from lora_trainer.settings import Place
from lora_trainer.sharding import check_sharded
from lora_trainer.strategy import Strategy

Make = Callable[..., RunSpec]
ALONE = Place(0, 0, 1)


def good_adapter() -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, int]]]:
    shapes = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (3, 2)}
    return {name: torch.ones(shape) for name, shape in shapes.items()}, shapes


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no weights": (lambda tensors: tensors.clear(), "missing"),
    "one is missing": (lambda tensors: tensors.pop("x.lora_A.weight"), "missing"),
    "one too many": (lambda tensors: tensors.update(y=torch.ones(1)), "not expected"),
    "the slice of one rank": (lambda tensors: tensors.update({"x.lora_B.weight": torch.ones(1, 2)}), "shape"),
    "not a number": (lambda tensors: tensors["x.lora_A.weight"].fill_(math.nan), "finite"),
    "never trained": (lambda tensors: tensors["x.lora_B.weight"].zero_(), "zero"),
    "integers": (lambda tensors: tensors.update({"x.lora_A.weight": torch.ones(2, 3, dtype=torch.int8)}), "finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_not_published(case: str) -> None:
    tensors, shapes = good_adapter()
    check_adapter(tensors, shapes)
    breaks, words = BROKEN[case]
    breaks(tensors)
    with pytest.raises(InternalError, match=words):
        check_adapter(tensors, shapes)


def test_a_model_that_is_not_sharded_is_refused() -> None:
    with pytest.raises(InternalError, match="0 parameters are distributed"):
        check_sharded(torch.nn.Linear(4, 4), 80, Strategy("fsdp", shards=2))


def test_every_epoch_has_an_order_of_its_own_in_whole_batches() -> None:
    sampler = EpochSampler(records=21, global_batch_size=4, seed=3)
    first = list(sampler)
    assert len(first) == len(sampler) == len(set(first)) == 20
    assert first == list(EpochSampler(21, 4, 3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    small = list(EpochSampler(records=3, global_batch_size=8, seed=3))
    assert len(small) == 8
    assert set(small) == {0, 1, 2}


def test_steps_of_a_run(make_run: Make) -> None:
    assert total_steps(make_run(), 48) == 4
    epochs = make_run(training={"maxSteps": None, "epochs": 2.5})
    assert total_steps(epochs, 48) == 15
    assert total_steps(epochs, 3) == 2


def test_batches_for_evaluation_hold_every_record_once_within_the_budget() -> None:
    lengths = [5, 1, 9, 3, 3, 20, 7]
    batches = make_batches(lengths, 12)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 12 for batch in batches)


def test_questions_of_each_format(make_run: Make) -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert question({"text": "a"}) is None
    assert question({"prompt": "a", "completion": " b"}) == ("a", " b")
    assert question({"messages": [user, assistant]}) == ([user], "b")
    assert question({"messages": [assistant]}) is None
    assert question({"prompt": [user], "completion": [assistant]}) == ([user], "b")
    publish = make_run(publish={"samplePrompts": ["hi"]}).publish
    assert sample_questions(publish, [], conversational=True) == [([{"role": "user", "content": "hi"}], None)]
    assert sample_questions(publish, [], conversational=False) == [("hi", None)]
    chat = {"messages": [user, assistant]}
    assert sample_questions(make_run().publish, [{"text": "a"}, chat], conversational=True) == [([user], "b")]


def test_a_loss_that_is_not_finite_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_trainer.evaluate

    ones = torch.ones(2, dtype=torch.float64)
    scores = RecordScores(torch.tensor([1.0, math.inf], dtype=torch.float64), ones, ones)
    monkeypatch.setattr(lora_trainer.evaluate, "score_records", lambda *_: scores)
    tokenizer: Any = type("T", (), {"pad_token_id": 0})()
    dataset: Any = type("D", (), {"lengths": [3, 4]})()
    with pytest.raises(DivergedError, match="not finite"):
        Evaluator(torch.nn.Identity(), tokenizer, dataset, [], 8, ALONE, torch.device("cpu")).loss()


def test_random_states_come_back() -> None:
    import random

    import numpy as np

    state = json.loads(json.dumps(read_rng_state()))
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    restore_rng_state(state)
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == drawn
