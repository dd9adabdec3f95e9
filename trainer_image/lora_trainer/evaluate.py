"""Loss and answers on held-out records: the same code before training, after it, and for a published adapter.

Before training the adapter's B matrices are zero, which is exactly the base model; nothing is switched off and on
again around it, because FSDP2 remembers which parameters need a gradient from their first use.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_api.publishing import Publish
from lora_api.status import format_time
from lora_trainer.chat import Chat
from lora_trainer.errors import DivergedError
from lora_trainer.formats import Record
from lora_trainer.packs import Sequences, collate
from lora_trainer.parallel import sum_over_ranks
from lora_trainer.settings import Place
from lora_trainer.sharding import reshard

MAX_NEW_TOKENS = 64
DEFAULT_SAMPLES = 4

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """A prompt, the answer that the data expects (if it has one), and what the model answered."""

    prompt: str
    expected: str | None
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """``loss``: what is trained, on evaluation records; ``None`` without any.

    In nats per token for objective sft. Rewards are those of preference pairs (objective dpo): the mean margin between
    chosen and rejected, and the share of pairs (0 to 1) whose chosen answer has the larger one. ``at`` is an RFC 3339
    time.
    """

    loss: float | None
    samples: list[Sample]
    at: str | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None

    @property
    def scores(self) -> dict[str, float | None]:
        """Its numbers as fields of ProgressLine."""
        return {
            "eval_loss": self.loss,
            "reward_margin": self.reward_margin,
            "reward_accuracy": self.reward_accuracy,
        }

    def to_wire(self) -> dict[str, Any]:
        """The JSON form."""
        return vars(self) | {"samples": [vars(sample) for sample in self.samples]}

    @staticmethod
    def from_wire(value: dict[str, Any]) -> "Evaluation":
        """The inverse of ``to_wire``."""
        return Evaluation(**value | {"samples": [Sample(**sample) for sample in value["samples"]]})


def question(record: Record) -> tuple[Prompt, str | None] | None:
    """``(prompt, expected answer)`` of a record, or ``None`` for plain text, which asks nothing."""
    if "text" in record:
        return None
    if "messages" in record:
        messages = record["messages"]
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        return (messages[:last], messages[last]["content"]) if last > 0 else None
    completion = record["chosen"] if "chosen" in record else record["completion"]
    expected = completion if isinstance(completion, str) else completion[-1]["content"]
    return record["prompt"], expected


def sample_questions(
    publish: Publish, shown: Sequence[Record], *, conversational: bool
) -> list[tuple[Prompt, str | None]]:
    """What is asked before and after training: the prompts that the user gave, else those of ``shown``."""
    if publish.sample_prompts:
        return [
            ([{"role": "user", "content": text}] if conversational else text, None) for text in publish.sample_prompts
        ]
    return [asked for record in shown[:DEFAULT_SAMPLES] if (asked := question(record)) is not None]


def make_batches(lengths: Sequence[int] | NDArray[Any], token_budget: int) -> list[list[int]]:
    """Numbers of the records in each batch: of similar length, at most ``token_budget`` tokens with padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * int(lengths[index]) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one model, again and again, on the same records and questions."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    dataset: Sequences | None
    questions: list[tuple[Prompt, str | None]]
    token_budget: int
    place: Place
    device: torch.device

    @property
    def records(self) -> int:
        """How many records the loss is measured on."""
        return 0 if self.dataset is None else len(self.dataset)

    def measure(self, interrupted: Callable[[], bool] | None = None) -> Evaluation | None:
        """Evaluation loss in nats per token, without answers. All ranks call it.

        ``interrupted`` is asked after each batch, by all ranks; when it says yes to all of them, there is no answer.

        Raises:
            DivergedError: it is not finite, on all ranks alike.
        """
        if self.dataset is None:
            return Evaluation(None, [])
        pad = int(self.tokenizer.pad_token_id)
        loss = evaluate_loss(self.model, self.dataset, pad, self.token_budget, self.place, self.device, interrupted)
        if loss is None:
            return None
        if not math.isfinite(loss):
            raise DivergedError(f"the evaluation loss is {loss}")
        return Evaluation(loss, [])

    def loss(self) -> float | None:
        """The loss of ``measure`` alone; ``None`` without evaluation records. All ranks call it."""
        found = self.measure()
        return found.loss if found is not None else None

    def run(self) -> Evaluation:
        """Loss and answers. All ranks call it."""
        found = self.measure() or Evaluation(None, [])
        answers = answer_questions(self.model, self.tokenizer, self.questions, self.device)
        return replace(found, samples=answers, at=format_time(datetime.now(UTC)))


@torch.no_grad()
def evaluate_loss(
    model: torch.nn.Module,
    dataset: Sequences,
    pad_token: int,
    token_budget: int,
    place: Place,
    device: torch.device,
    interrupted: Callable[[], bool] | None = None,
) -> float | None:
    """Mean negative log likelihood per supervised token over the whole of ``dataset``, in nats.

    Each rank takes every ``world_size``-th batch; sums of losses and of tokens are added up, so that the result does
    not depend on the number of processes. With sharded weights all ranks must run equally many forward passes: a rank
    that has none left repeats the first batch and does not count it. ``None`` where ``interrupted`` said so.
    """
    batches = make_batches(dataset.lengths, token_budget)
    rounds = -(-len(batches) // place.world_size)
    training, total, tokens = model.training, 0.0, 0.0
    model.eval()
    for turn in range(rounds):
        number = turn * place.world_size + place.rank
        counted = number < len(batches)
        chosen = [dataset[index] for index in batches[number if counted else 0]]
        batch = collate(chosen, "padded", pad_token)
        moved = {name: value.to(device) for name, value in batch.items()}
        losses = model(**moved, use_cache=False, score_tokens=True).losses
        if counted:
            total += float(losses.sum(dtype=torch.float64))
            tokens += len(losses)
        if interrupted is not None and interrupted():
            model.train(training)
            reshard(model)
            return None
    model.train(training)
    reshard(model)
    total, tokens = sum_over_ranks([total, tokens], device)
    return total / max(tokens, 1.0)


@torch.no_grad()
def generate(
    model: torch.nn.Module, tokenizer: Tokenizer, prompts: list[Prompt], device: torch.device, max_new_tokens: int
) -> list[str]:
    """Greedy answers, at most ``max_new_tokens`` tokens each. All ranks call it with the same prompts."""
    if not prompts:
        return []
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    pad = int(tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
    sharded = isinstance(model, FSDPModule)
    if sharded:
        register_fsdp_forward_method(model, "generate")
    training = model.training
    model.eval()
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        disable_compile=True,  # on GPUs it would compile where generation_config.json asks for a static cache (Gemma 2)
        pad_token_id=pad,
        synced_gpus=sharded,
    )
    model.train(training)
    reshard(model)
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, as records are encoded for training."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return Chat(tokenizer).encode(prompt, generation_prompt=True)


def show_prompt(prompt: Prompt) -> str:
    """A prompt for people."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def longest_answer(tokenizer: Tokenizer, questions: list[tuple[Prompt, str | None]], limit: int) -> int:
    """Tokens that an answer may have: a little more than the longest expected one, where all are known."""
    expected = [answer for _, answer in questions if answer is not None]
    if len(expected) < len(questions) or not expected:
        return limit
    return min(limit, max(len(tokenizer(answer)["input_ids"]) for answer in expected) + 4)


def answer_questions(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    questions: list[tuple[Prompt, str | None]],
    device: torch.device,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Sample]:
    """The model's answers to ``questions``."""
    longest = longest_answer(tokenizer, questions, max_new_tokens)
    answers = generate(model, tokenizer, [prompt for prompt, _ in questions], device, longest)
    return [
        Sample(show_prompt(prompt), expected, answer)
        for (prompt, expected), answer in zip(questions, answers, strict=True)
    ]
