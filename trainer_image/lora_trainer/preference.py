"""Direct preference optimization (DPO; Rafailov et al. 2023, arXiv:2305.18290) on the shared trainer.

The reference is the base model under the adapter. Its log-probabilities are computed once, before the first step, while
the adapter's B matrices are zero: that is exactly the base model. Nothing is switched off and on again later, because
FSDP2 remembers which parameters need a gradient from their first use. A checkpoint holds them, for a trained adapter
cannot give them any more.

TRL's DPOTrainer would add a second, frozen adapter to the model it is given, which FSDP2 would shard and the checkpoint
would have to tell apart, and would compute its reference before the model is sharded. The loss is a few lines, so they
are here.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open
from torch.nn.functional import logsigmoid, relu
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TrainerCallback, TrainingArguments

from lora_api.run import RunSpec
from lora_api.served import Score
from lora_api.training import DPO
from lora_trainer.checkpointfiles import OBJECTIVE_STATE, Resume
from lora_trainer.errors import BadDataError, DivergedError, InternalError
from lora_trainer.evaluate import Evaluation, Evaluator, make_batches
from lora_trainer.pairs import TokenPair, digest_pairs, pad_sequences
from lora_trainer.parallel import sum_over_ranks
from lora_trainer.prepare import TrainingData
from lora_trainer.progress import Progress
from lora_trainer.sampler import EpochSampler
from lora_trainer.settings import Place
from lora_trainer.sharding import reshard
from lora_trainer.speed import compile_layers, read_levers
from lora_trainer.trainer import LoRATrainer, loop_arguments, restore_adapter_precision

HEARTBEAT_SECONDS = 30.0
"""How often a long evaluation of the reference says that it is alive."""


# -- the loss


@dataclass(frozen=True)
class Ratios:
    """What pairs gained against the reference, each of shape (pairs,).

    ``chosen`` and ``rejected``: log(policy / reference) of the whole answer, in nats. Tokens are those of the answer.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


def pair_losses(ratios: Ratios, dpo: DPO) -> torch.Tensor:
    """The loss of each pair, shape (pairs,).

    With m the chosen ratio minus the rejected one, in nats:

    sigmoid: -log sigmoid(beta m), eq. 7 of arXiv:2305.18290.
    hinge: max(0, 1 - beta m), SLiC's loss (arXiv:2305.10425) on ratios to a reference (RSO, arXiv:2309.06657).
    ipo: (m - 1 / (2 beta))^2, eq. 17 of arXiv:2310.12036. Its ratios are means per token, which its authors used: with
    sums, the longer the answers the larger the loss.

    Label smoothing s is the expected loss when a share s of the pairs is the wrong way round: (1 - s) L(m) + s L(-m)
    (for sigmoid: conservative DPO, Mitchell 2023).
    """
    chosen, rejected = ratios.chosen, ratios.rejected
    if dpo.loss == "ipo":
        chosen, rejected = chosen / ratios.chosen_tokens, rejected / ratios.rejected_tokens
    margin = chosen - rejected
    smoothing = dpo.label_smoothing
    losses = _one_way(margin, dpo)
    return (1 - smoothing) * losses + smoothing * _one_way(-margin, dpo) if smoothing else losses


def _one_way(margin: torch.Tensor, dpo: DPO) -> torch.Tensor:
    if dpo.loss == "hinge":
        return relu(1 - dpo.beta * margin)
    if dpo.loss == "ipo":
        return (margin - 1 / (2 * dpo.beta)) ** 2
    return -logsigmoid(dpo.beta * margin)


@torch.no_grad()
def sum_rewards(ratios: Ratios, beta: float) -> torch.Tensor:
    """Sums over pairs: reward margin (beta times m), and pairs whose chosen answer has the larger reward.

    Rewards that are equal count as half a pair, as a coin would decide it: before training all of them are.
    """
    margin = beta * (ratios.chosen - ratios.rejected).double()
    return torch.stack([margin.sum(), (margin > 0).double().sum() + (margin == 0).double().sum() / 2])


# -- log-probabilities


def answer_log_probs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability in nats of each sequence's answer, float64, shape (sequences,).

    Two answers of a thousand nats may differ by a thousandth: float32 keeps four digits of that.
    """
    scores = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        use_cache=False,
        score_tokens=True,
    )
    losses = torch.zeros_like(scores.supervised, dtype=torch.float32).masked_scatter(scores.supervised, scores.losses)
    return -losses.sum(dim=1, dtype=torch.float64)


@dataclass(frozen=True)
class Scorer:
    """Log-probabilities of whole sets of pairs, spread over all processes."""

    model: torch.nn.Module
    pad_token: int
    token_budget: int
    place: Place
    device: torch.device

    @torch.no_grad()
    def score(
        self,
        pairs: Sequence[TokenPair],
        heartbeat: Callable[[], None] = lambda: None,
        interrupted: Callable[[], bool] | None = None,
    ) -> torch.Tensor | None:
        """Log-probabilities in nats of chosen and rejected, float64 on the CPU, shape (pairs, 2). All ranks call it.

        ``None`` where ``interrupted``, which all ranks ask after each batch, said so.

        Each rank takes every ``world_size``-th batch. With sharded weights all ranks must run equally many forward
        passes: one that has none left repeats the first batch and leaves it out.
        """
        sequences = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        batches = make_batches([len(prompt) + len(answer) for prompt, answer in sequences], self.token_budget)
        found = torch.zeros(len(sequences), dtype=torch.float64)
        world, training, spoke = self.place.world_size, self.model.training, time.monotonic()
        self.model.eval()
        for turn in range(-(-len(batches) // world)):
            number = turn * world + self.place.rank
            indices = batches[number if number < len(batches) else 0]
            batch = pad_sequences([sequences[index] for index in indices], self.pad_token)
            placed = {name: tensor.to(self.device) for name, tensor in batch.items()}
            values = answer_log_probs(self.model, placed)
            if number < len(batches):
                found[indices] = values.cpu()
            if time.monotonic() - spoke > HEARTBEAT_SECONDS:
                heartbeat()
                spoke = time.monotonic()
            if interrupted is not None and interrupted():
                self.model.train(training)
                reshard(self.model)
                return None
        self.model.train(training)
        reshard(self.model)
        return self._add_up(found).view(-1, 2)

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        if self.place.world_size == 1:
            return values
        placed = values.to(self.device)
        dist.all_reduce(placed)
        return placed.cpu()


def whole_ratios(policy: torch.Tensor, reference: torch.Tensor, pairs: Sequence[TokenPair]) -> Ratios:
    """Ratios of scored pairs. ``policy`` and ``reference`` are log-probabilities of shape (pairs, 2)."""
    gained = policy - reference
    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs], dtype=gained.dtype)
    return Ratios(gained[:, 0], gained[:, 1], lengths[:, 0], lengths[:, 1])


# -- evaluation


@dataclass(frozen=True)
class PreferenceEvaluator(Evaluator):
    """Evaluates on held-out pairs: the loss that is trained, and how often the chosen answer has the larger reward."""

    pairs: Sequence[TokenPair] = ()
    reference: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    dpo: DPO = field(default_factory=DPO)

    @property
    def records(self) -> int:
        """How many pairs the loss is measured on."""
        return len(self.pairs)

    def measure(self, interrupted: Callable[[], bool] | None = None) -> Evaluation | None:
        """DPO loss, reward margin and accuracy. All ranks call it. ``None`` where ``interrupted`` said so.

        Raises:
            DivergedError: the loss is not finite, on all ranks alike.
        """
        if not self.pairs:
            return Evaluation(None, [])
        pad = int(self.tokenizer.pad_token_id)
        scorer = Scorer(self.model, pad, self.token_budget, self.place, self.device)
        scores = scorer.score(self.pairs, interrupted=interrupted)
        if scores is None:
            return None
        ratios = whole_ratios(scores, self.reference, self.pairs)
        loss = float(pair_losses(ratios, self.dpo).mean())
        if not math.isfinite(loss):
            raise DivergedError(f"the evaluation loss is {loss}")
        margin, right = (sum_rewards(ratios, self.dpo.beta) / len(self.pairs)).tolist()
        part = self._score_part(scores)
        return Evaluation(loss, [], reward_margin=margin, reward_accuracy=right, share=right, part=part)

    def _score_part(self, scores: torch.Tensor) -> Score:
        """The loss and the accuracy of the pairs of ``part``."""
        numbers = list(range(len(self.pairs)) if self.part is None else self.part)
        ratios = whole_ratios(scores[numbers], self.reference[numbers], [self.pairs[number] for number in numbers])
        right = float(sum_rewards(ratios, self.dpo.beta)[1]) / len(numbers)
        return Score(loss=float(pair_losses(ratios, self.dpo).mean()), share=right)

    def of_part(self, model: torch.nn.Module, token_budget: int) -> "PreferenceEvaluator":
        """An evaluator of another ``model`` on the pairs of ``part``. All ranks call it.

        Their reference is ``model`` as it is now: its adapter is fresh.
        """
        pairs = self.pairs if self.part is None else [self.pairs[number] for number in self.part]
        pad = int(self.tokenizer.pad_token_id)
        reference = Scorer(model, pad, token_budget, self.place, self.device).score(pairs)
        assert reference is not None  # noqa: S101 - nobody interrupts
        return replace(
            self,
            model=model,
            pairs=pairs,
            reference=reference,
            part=None,
            questions=[],
            token_budget=token_budget,
        )


# -- training


class PreferenceTrainer(LoRATrainer):
    """Trains on pairs. A micro-batch of n pairs is one forward pass over 2n sequences."""

    loss_is_scaled_for_ga = False

    def __init__(self, *, dpo: DPO, pairs: list[TokenPair], eval_pairs: list[TokenPair], pad_token: int, **rest: Any):
        self.dpo, self.pad_token = dpo, pad_token
        self.pairs, self.eval_pairs = pairs, eval_pairs
        self.reference = {"train": torch.full((len(pairs), 2), math.nan, dtype=torch.float64)}
        self._rewards = torch.zeros(3, dtype=torch.float64)
        self._tokens = torch.zeros((), dtype=torch.int64)
        super().__init__(train_dataset=pairs, data_collator=self.collate, **rest)
        self._rewards, self._tokens = self._rewards.to(self.args.device), self._tokens.to(self.args.device)

    def collate(self, pairs: Sequence[TokenPair]) -> dict[str, torch.Tensor]:
        """A micro-batch: chosen sequences first, then the rejected ones, and the reference's log-probabilities."""
        sequences = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
        reference = self.reference["train"][[pair.index for pair in pairs]]
        return pad_sequences(sequences, self.pad_token) | {"reference": reference.T.reshape(-1)}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean loss of a micro-batch. All micro-batches have equally many pairs, so their mean is the global mean."""
        gained = answer_log_probs(model, inputs) - inputs["reference"]
        lengths = (inputs["labels"][:, 1:] >= 0).sum(dim=1)
        ratios = Ratios(*gained.chunk(2), *lengths.chunk(2))
        sums, count = sum_rewards(ratios, self.dpo.beta), torch.full_like(ratios.chosen[:1].double(), len(gained) // 2)
        self._rewards += torch.cat([sums, count])
        self._tokens += inputs["attention_mask"].sum()
        return pair_losses(ratios, self.dpo).mean().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the rewards since the last time, over all ranks, and the tokens since training began."""
        if "loss" in logs:
            values = [*self._rewards.tolist(), float(self._tokens)]
            margin, right, count, tokens = sum_over_ranks(values, self.args.device)
            logs |= {"reward_margin": margin / count, "reward_accuracy": right / count, "num_tokens": tokens}
            self._rewards.zero_()
        super().log(logs, start_time)

    # -- the reference

    def prepare(self, resume: Resume | None, token_budget: int, place: Place, progress: Progress) -> None:
        """Gets the reference's log-probabilities: from the checkpoint, else from the model, whose adapter is fresh.

        Of the training pairs only those are computed that a step will see.

        Raises:
            BadDataError: the checkpoint is of other pairs.
            InternalError: the checkpoint has none.
        """
        if resume is not None:
            self.reference = self._load_reference(resume.directory / OBJECTIVE_STATE)
            return
        scorer = Scorer(self.model, self.pad_token, token_budget, place, self.args.device)
        seen = sorted(self._indices_of_steps())
        heartbeat = lambda: progress.stage("evaluating")  # noqa: E731
        self.reference["train"][seen] = scorer.score([self.pairs[index] for index in seen], heartbeat)
        if self.eval_pairs:
            self.reference["eval"] = scorer.score(self.eval_pairs, heartbeat)

    def _indices_of_steps(self) -> set[int]:
        sampler: EpochSampler = self._get_train_sampler()
        args = self.args
        left = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
        seen: set[int] = set()
        epoch = 0
        while left > 0 and len(seen) < len(self.pairs):
            sampler.set_epoch(epoch)
            seen.update(list(sampler)[:left])
            left, epoch = left - len(sampler), epoch + 1
        return seen

    def objective_state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The reference's log-probabilities for a checkpoint, and whose they are."""
        return self.reference, {"pairs": digest_pairs([*self.pairs, *self.eval_pairs])}

    def _load_reference(self, path: Path) -> dict[str, torch.Tensor]:
        if not path.exists():
            raise InternalError(f"{path.name} is missing in the checkpoint: it was made by another objective")
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("pairs") != digest_pairs([*self.pairs, *self.eval_pairs]):
                raise BadDataError("dataset: the records are not those that the checkpoint's steps were trained on")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    def build_evaluator(
        self, tokenizer: Tokenizer, questions: list[Any], token_budget: int, place: Place
    ) -> PreferenceEvaluator:
        """An evaluator of this trainer's model on the held-out pairs."""
        return PreferenceEvaluator(
            self.model,
            tokenizer,
            None,
            questions,
            token_budget,
            place,
            self.args.device,
            pairs=self.eval_pairs,
            reference=self.reference.get("eval", torch.zeros(0, 2)),
            dpo=self.dpo,
        )


def build_preference_trainer(
    run: RunSpec,
    model: PeftModel,
    tokenizer: Tokenizer,
    data: TrainingData,
    device: torch.device,
    directory: Path,
    callbacks: Sequence[TrainerCallback],
) -> PreferenceTrainer:
    """The trainer of ``run``: its model is not sharded yet.

    Raises:
        BadSpecError: the batch sizes do not fit.
    """
    arguments = loop_arguments(run, len(data.train), device, directory)
    if run.training.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = PreferenceTrainer(
        dpo=run.training.dpo or DPO(),
        pairs=data.train,
        eval_pairs=data.eval or [],
        pad_token=int(tokenizer.pad_token_id),
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    restore_adapter_precision(model)
    if read_levers().compile:
        compile_layers(model, device)
    return trainer
