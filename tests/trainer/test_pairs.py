"""Preference pairs: the losses by hand, what is cut of a pair, its tokens, and the memory of its logits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

from lora_api.training import DPO, LoRA, Quantization
from lora_trainer import loss
from lora_trainer.errors import BadDataError
from lora_trainer.evaluate import encode_prompt
from lora_trainer.model import add_adapter, load_base_model
from lora_trainer.pairs import cut_pair, pad_sequences, tokenize_pair, tokenize_pairs
from lora_trainer.preference import Ratios, answer_log_probs, pair_losses, sum_rewards

# -- losses


def ratios(chosen: float, rejected: float, tokens: tuple[int, int] = (1, 1)) -> Ratios:
    return Ratios(*(torch.tensor([float(value)]) for value in (chosen, rejected, *tokens)))


LOSSES: dict[str, tuple[dict[str, Any], Ratios, float]] = {
    "sigmoid, no margin": ({}, ratios(3, 3), math.log(2)),
    "sigmoid": ({"beta": 0.5}, ratios(3, -1), math.log1p(math.exp(-2))),
    "sigmoid, the wrong way round": ({"beta": 0.5}, ratios(-1, 3), math.log1p(math.exp(2))),
    "sigmoid, smoothed": (
        {"beta": 0.5, "label_smoothing": 0.1}, ratios(3, -1),
        0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))),
    "hinge, inside the margin": ({"loss": "hinge", "beta": 0.1}, ratios(3, -1), 0.6),
    "hinge, beyond it": ({"loss": "hinge", "beta": 0.5}, ratios(3, -1), 0.0),
    "hinge, smoothed": ({"loss": "hinge", "beta": 0.5, "label_smoothing": 0.25}, ratios(3, -1), 0.25 * 3),
    "ipo is per token": ({"loss": "ipo", "beta": 0.25}, ratios(6, -4, (3, 2)), (4 - 2) ** 2),
    "ipo at its target": ({"loss": "ipo", "beta": 0.125}, ratios(6, -4, (3, 2)), 0.0),
    "ipo, smoothed": (
        {"loss": "ipo", "beta": 0.25, "label_smoothing": 0.5 - 0.25}, ratios(6, -4, (3, 2)), 0.75 * 4 + 0.25 * 36),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_that_of_its_paper(case: str) -> None:
    settings, given, expected = LOSSES[case]
    assert float(pair_losses(given, DPO(**settings))) == pytest.approx(expected, abs=1e-6)


def test_rewards_that_are_equal_count_as_half_a_pair() -> None:
    given = Ratios(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 4.0, 1.0]), torch.ones(3), torch.ones(3))
    assert sum_rewards(given, 0.5).tolist() == [1.0, 1.5]


# -- tokens

PROMPT = list(range(10, 20))
CUTS: dict[str, tuple[tuple[list[int], list[int], list[int], int, int | None], tuple[list[int], ...], int]] = {
    "what fits is whole": ((PROMPT, [1, 2], [3], 12, None), (PROMPT, [1, 2], [3]), 0),
    "the prompt gives way first, from its left": (
        (PROMPT, [1, 2, 3], [4], 12, None), (PROMPT[1:], [1, 2, 3], [4]), 2),
    "its first token stays": ((PROMPT, [1, 2, 3], [4], 12, 10), ([10, *PROMPT[2:]], [1, 2, 3], [4]), 2),
    "down to half of the limit": (
        (PROMPT, [1] * 9, [2] * 4, 8, None), (PROMPT[6:], [1] * 4, [2] * 4), 12 + 5),
    "a short prompt leaves its room to the answers": (
        ([10, 11], [1] * 9, [2] * 4, 8, None), ([10, 11], [1] * 6, [2] * 4), 3),
}  # fmt: skip


@pytest.mark.parametrize("case", CUTS)
def test_a_pair_is_cut_so_that_both_answers_stay_comparable(case: str) -> None:
    given, kept, lost = CUTS[case]
    cut = cut_pair(*given)
    assert ((cut.prompt, cut.chosen, cut.rejected), cut.lost) == (kept, lost)


def test_pairs_that_are_equal_once_they_are_cut_are_dropped_and_counted(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    same = " red" * 30
    records = [
        {"prompt": "Say:", "chosen": same + " cat", "rejected": same + " dog"},
        {"prompt": "Say:", "chosen": " cat", "rejected": " dog"},
        {"prompt": "Say it, please:" * 20, "chosen": " cat", "rejected": " dog"},
    ]
    found = tokenize_pairs(tokenizer, records, 24)
    assert (len(found.pairs), found.dropped, found.truncated) == (2, 1, 1)
    assert [pair.index for pair in found.pairs] == [0, 1]
    assert found.pairs[1].length == 24
    assert tokenizer.decode(found.pairs[1].prompt).endswith("please:")
    report = found.report(5)
    assert (report.train_records, report.sequences, report.dropped_records, report.eval_records) == (2, 2, 1, 5)
    assert report.supervised_tokens == sum(len(pair.chosen) + len(pair.rejected) for pair in found.pairs)
    assert 0.5 < report.lost_token_share < 1
    assert report.longest > 24


def test_answers_are_tokenized_as_the_model_meets_them(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenize_pair(tokenizer, {"prompt": "Say red", "chosen": " twice", "rejected": " no</s>"})
    assert list(map(tokenizer.decode, text)) == ["Say red", " twice</s>", " no</s>"]
    chat = {
        "prompt": [{"role": "user", "content": "red"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    decoded = list(map(tokenizer.decode, tokenize_pair(tokenizer, chat)))
    assert decoded == ["<|user|>red</s><|assistant|>", "yes</s>", "no</s>"]


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(model: Path) -> None:
    """Otherwise a run that is resumed on the next day would not know its own pairs again."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    answer = [{"role": "assistant", "content": "yes"}]
    prompt, _, _ = tokenize_pair(
        tokenizer, {"prompt": [{"role": "user", "content": "red"}], "chosen": answer, "rejected": answer}
    )
    assert tokenizer.decode(prompt).startswith("26 Jul 2024 <|user|>red")
    assert encode_prompt(tokenizer, [{"role": "user", "content": "red"}]) == prompt


def test_a_template_that_refuses_a_pair_says_why(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    answer = [{"role": "assistant", "content": "yes"}]
    record = {"prompt": [{"role": "system", "content": "x"}], "chosen": answer, "rejected": answer}
    with pytest.raises(BadDataError, match="refuses a pair with the roles system: line 1: no system messages"):
        tokenize_pair(tokenizer, record)


class Largest(TorchDispatchMode):
    """Finds the largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_logits_of_the_whole_batch_are_never_held(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 0)
    base = load_base_model(model, Quantization(type="none"), torch.device("cpu"))
    network = add_adapter(base, LoRA(r=4, alpha=8), 0)
    prompt, answer = torch.arange(8, dtype=torch.int32), torch.arange(240, dtype=torch.int32)
    batch = pad_sequences([(prompt, answer)] * 4, 2)
    tokens, vocabulary, hidden = batch["input_ids"].numel(), 512, 128
    with Largest() as largest:
        log_probs = answer_log_probs(network, batch)
        log_probs.sum().backward()
    assert log_probs.dtype == torch.float64  # a difference of large sums is what is learned from
    assert tokens * hidden <= largest.elements < tokens * vocabulary / 2
