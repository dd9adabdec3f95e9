"""Objective dpo: its losses by hand, whole runs in one and two processes, and what a checkpoint must hold for it."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_api.training import DPO, Quantization
from lora_trainer.errors import BadDataError, InternalError, StoppedError
from lora_trainer.evaluate import encode_prompt
from lora_trainer.model import add_adapter, load_base_model
from lora_trainer.pairs import cut_pair, pad_sequences, tokenize_pair, tokenize_pairs
from lora_trainer.preference import Ratios, answer_log_probs, fuse_head, pair_losses, sum_rewards
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.stop import StopRequest
from lora_trainer.store import split_uri
from lora_trainer.train import train
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import Launched, build_run, merge

Build = Callable[..., RunSpec]
Launch = Callable[..., Launched]
CPU = torch.device("cpu")
STEPS = 8
BASE: dict[str, Any] = {"training": {"objective": "dpo", "maxSteps": STEPS, "evalEverySteps": 4}}
REFUSAL = " no, I will not say it"


def make_pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Pairs that are easy to tell apart: the answer is preferred to a refusal."""
    rows = make_rows(count, start)
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": REFUSAL} for row in rows]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with train.jsonl (36 pairs) and eval.jsonl (9 pairs)."""
    directory = tmp_path_factory.mktemp("pairs")
    write_rows(directory / "train.jsonl", make_pairs(36))
    write_rows(directory / "eval.jsonl", make_pairs(9, start=200))
    return directory


@pytest.fixture
def make_run(model: Path, pairs: Path, tmp_path: Path) -> Build:
    """Builds a DPO run: eight steps, which is two epochs of 36 pairs."""
    return lambda **changes: build_run(model, pairs, tmp_path, merge(BASE, changes))


@dataclass
class Recorder(Progress):
    """Keeps what was reported, and asks the run to stop after a step."""

    stop: StopRequest
    stop_after: int | None = None
    enabled: bool = False
    step: int = 0
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)

    def report_step(self, **fields: Any) -> None:
        super().report_step(**fields)
        self.steps[fields["step"]] = fields
        self.stop.requested = fields["step"] == self.stop_after

    def report_eval(self, **fields: Any) -> None:
        self.evaluations[fields["step"]] = fields

    @property
    def losses(self) -> dict[int, float]:
        return {step: fields["loss"] for step, fields in self.steps.items()}


@dataclass
class Outcome:
    """The end of a run in this process. No adapter: it stopped."""

    adapter: AdapterStatus | None
    seen: Recorder


def run_here(run: RunSpec, directory: Path, stop_after: int | None = None) -> Outcome:
    """Trains ``run`` in this process, with an empty scratch directory."""
    seen = Recorder(StopRequest(), stop_after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_STATE_DIR", str(directory))
        try:
            return Outcome(train(run, Place(0, 0, 1), seen.stop, seen), seen)
        except StoppedError:
            return Outcome(None, seen)


@pytest.fixture(scope="module")
def whole(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The whole run in one process, with nothing in its way."""
    directory = tmp_path_factory.mktemp("whole")
    return run_here(build_run(model, pairs, directory, BASE), directory / "work")


def published(adapter: AdapterStatus | None) -> Path:
    assert adapter is not None
    return Path("/" + split_uri(adapter.uri)[1].lstrip("/"))


def log_prob(network: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Log-probability of ``answer``, written out: a sequence alone, without padding, from the whole logits."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        table = network(ids).logits[0, :-1].double().log_softmax(-1)
    return sum(float(table[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


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
    assert encode_prompt(tokenizer, [{"role": "user", "content": "red"}]) == prompt[: len(prompt)]


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


def test_logits_of_the_whole_batch_are_never_held(
    model: Path, make_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.kernels.chunked_logprob as kernel
    import trl.trainer.utils as head

    monkeypatch.setattr(kernel, "TOKEN_CHUNK_SIZE", 64)
    monkeypatch.setattr(head, "_CHUNKED_LOGPROB_CHUNK_SIZE", 512)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = add_adapter(base, make_run().lora, 0)
    fuse_head(network)
    prompt, answer = torch.arange(8, dtype=torch.int32), torch.arange(240, dtype=torch.int32)
    batch = pad_sequences([(prompt, answer)] * 4, 2)
    tokens, vocabulary, hidden = batch["input_ids"].numel(), 512, 128
    with Largest() as largest:
        answer_log_probs(network, batch).sum().backward()
    assert tokens * hidden <= largest.elements < tokens * vocabulary / 2


# -- whole runs


def test_pairs_that_can_be_told_apart_are(whole: Outcome) -> None:
    seen = whole.seen
    assert set(seen.steps) == set(range(1, STEPS + 1))
    assert set(seen.evaluations) == {0, 4, STEPS}
    before, after = seen.evaluations[0], seen.evaluations[STEPS]
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["reward_accuracy"] == 0.5
    assert before["reward_margin"] == 0
    assert after["reward_accuracy"] > 0.9
    assert after["reward_margin"] > 0.5
    assert after["eval_loss"] < 0.5
    assert seen.steps[STEPS]["reward_accuracy"] > 0.9
    assert seen.steps[STEPS]["tokens_per_second"] > 0
    assert whole.adapter is not None
    assert (whole.adapter.eval_loss_before, whole.adapter.eval_loss_after) == (before["eval_loss"], after["eval_loss"])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_the_loss_of_the_published_adapter_is_that_of_two_models_written_out(
    loss: str, make_run: Build, model: Path, pairs: Path, tmp_path: Path
) -> None:
    dpo = {"loss": loss, "beta": 0.2, "labelSmoothing": 0.1}
    training = {"maxSteps": 3, "evalEverySteps": None, "dpo": dpo}
    run = make_run(training=training, quantization={"type": "none"}, checkpoint={"everySteps": 100})
    adapter = run_here(run, tmp_path / "work").adapter
    assert adapter is not None
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), published(adapter)
    )
    losses = []
    for line in (pairs / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        gained, lengths = [], []
        for answer in (row["chosen"], row["rejected"]):
            scores = [log_prob(network, tokenizer, row["prompt"], answer) for network in (policy, reference)]
            gained.append(scores[0] - scores[1])
            ids = tokenizer(row["prompt"] + answer + tokenizer.eos_token)["input_ids"]
            lengths.append(len(ids) - len(tokenizer(row["prompt"])["input_ids"]))
        for weight, sign in ((0.9, 1), (0.1, -1)):
            margin = sign * (gained[0] - gained[1])
            per_token = sign * (gained[0] / lengths[0] - gained[1] / lengths[1])
            value = {
                "sigmoid": math.log1p(math.exp(-0.2 * margin)),
                "hinge": max(0.0, 1 - 0.2 * margin),
                "ipo": (per_token - 1 / 0.4) ** 2,
            }[loss]
            losses.append(weight * value)
    assert adapter.eval_loss_after == pytest.approx(sum(losses) / 9, abs=1e-5)
    assert adapter.eval_loss_after != pytest.approx(adapter.eval_loss_before, abs=1e-3)


def checkpoint(run: RunSpec) -> Path:
    """Directory of the only checkpoint of ``run``."""
    root = Path("/" + split_uri(run.publish.store)[1].lstrip("/"))
    (found,) = (root / "tests/tiny/checkpoints/uid-1").iterdir()
    return found


def objective_state(run: RunSpec) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run) / "objective.safetensors")


def check_reference(saved: torch.Tensor, rows: list[dict[str, str]], model: Path) -> int:
    """Compares log-probabilities with those of a quantized base model without an adapter. Returns how many."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = load_base_model(model, Quantization(), CPU)
    base.eval()
    known = 0
    for values, row in zip(saved.tolist(), rows, strict=True):
        if math.isnan(values[0]):
            continue
        known += 1
        expected = [log_prob(base, tokenizer, row["prompt"], row[answer]) for answer in ("chosen", "rejected")]
        assert values == pytest.approx(expected, abs=1e-4)
    return known


def test_a_stopped_run_goes_on_with_the_losses_of_an_uninterrupted_one(
    make_run: Build, model: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lora": {"dropout": 0.2}, "training": {"evalEverySteps": None}}
    whole = run_here(make_run(**changes, publish={"store": f"file://{tmp_path}/whole"}), tmp_path / "all")
    run = make_run(**changes)
    stopped = run_here(run, tmp_path / "first", stop_after=3)
    assert stopped.adapter is None
    saved = objective_state(run)
    assert check_reference(saved["eval"], make_pairs(9, start=200), model) == 9
    assert check_reference(saved["train"], make_pairs(36), model) == 36
    resumed = run_here(run.model_copy(update={"attempt": 2}), tmp_path / "second")
    assert stopped.seen.losses | resumed.seen.losses == pytest.approx(whole.seen.losses, abs=1e-6)
    assert resumed.adapter is not None
    assert whole.adapter is not None
    assert resumed.adapter.digest == whole.adapter.digest
    assert resumed.adapter.eval_loss_before == whole.adapter.eval_loss_before


def test_only_pairs_that_a_step_sees_are_scored_and_a_checkpoint_is_of_its_own_records(
    make_run: Build, model: Path, tmp_path: Path
) -> None:
    run = make_run(training={"maxSteps": 3})
    assert run_here(run, tmp_path / "first", stop_after=1).adapter is None
    assert check_reference(objective_state(run)["train"], make_pairs(36), model) == 24

    again = run.model_copy(update={"attempt": 2})
    other = write_rows(tmp_path / "other.jsonl", make_pairs(36, start=1))
    moved = again.dataset.model_copy(
        update={"train": again.dataset.train.model_copy(update={"uri": f"file://{other}"})}
    )
    with pytest.raises(BadDataError, match="the records are not those that the checkpoint's steps were trained on"):
        run_here(again.model_copy(update={"dataset": moved}), tmp_path / "second")
    complete = checkpoint(run) / "COMPLETE.json"
    marker = json.loads(complete.read_text())
    marker["files"] = [file for file in marker["files"] if file["path"] != "objective.safetensors"]
    complete.write_text(json.dumps(marker))
    with pytest.raises(InternalError, match="made by another objective"):
        run_here(again, tmp_path / "third")


def test_two_processes_learn_what_one_learns_also_after_a_stop(
    make_run: Build, launch: Launch, whole: Outcome, model: Path
) -> None:
    run = make_run(parallelism={"nodes": 2})
    stopped = launch(run)
    stopped.wait_step(3)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.log.read_text()[-5000:]
    assert check_reference(objective_state(run)["train"], make_pairs(36), model) == 36
    resumed = launch(run.model_copy(update={"attempt": 2}))
    assert resumed.wait() == 0, resumed.log.read_text()[-5000:]
    assert stopped.losses | resumed.losses == pytest.approx(whole.seen.losses, abs=1e-4)
    for line in stopped.lines + resumed.lines:
        if line.event in ("step", "eval"):
            expected = (whole.seen.steps if line.event == "step" else whole.seen.evaluations)[line.step or 0]
            assert line.reward_margin == pytest.approx(expected["reward_margin"], abs=1e-4)
    adapter = resumed.words.adapter
    assert adapter is not None
    assert whole.adapter is not None
    assert adapter.eval_loss_before == pytest.approx(whole.adapter.eval_loss_before, abs=1e-4)
    assert adapter.eval_loss_after == pytest.approx(whole.adapter.eval_loss_after, abs=1e-4)
    reloaded = PeftModel.from_pretrained(load_base_model(model, run.quantization, CPU), published(adapter))
    assert isinstance(reloaded, PeftModel)
