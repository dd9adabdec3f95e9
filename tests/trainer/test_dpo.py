"""Objective dpo: whole runs in one and two processes, and what a checkpoint must hold for it."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_api.training import Quantization
from lora_trainer.cli import main
from lora_trainer.errors import BadDataError, InternalError, StoppedError
from lora_trainer.model import load_base_model
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


def test_a_published_adapter_is_measured_on_pairs_against_its_base(
    whole: Outcome, model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In NF4, as it was trained and evaluated."""
    assert whole.adapter is not None
    command = ["evaluate", "--objective", "dpo", "--json", "--model", f"file://{model}"]
    command += ["--data", f"file://{pairs}/eval.jsonl", "--max-new-tokens", "4"]
    assert main([*command, "--adapter", whole.adapter.uri]) == 0
    found, seen = json.loads(capsys.readouterr().out), whole.seen.evaluations[STEPS]
    assert found["records"] == found["answered"] == 9
    assert found["evalLoss"] == pytest.approx(seen["eval_loss"], abs=1e-4)
    assert found["rewardMargin"] == pytest.approx(seen["reward_margin"], abs=1e-4)
    assert found["rewardAccuracy"] == seen["reward_accuracy"]

    assert main([*command, "--adapter", whole.adapter.uri, "--beta", "0.2"]) == 0
    assert json.loads(capsys.readouterr().out)["rewardMargin"] == pytest.approx(2 * seen["reward_margin"], abs=1e-3)
    assert main([word for word in command if word != "--json"]) == 0
    text = capsys.readouterr().out
    assert "evaluation loss 0.6931 on 9 records" in text
    assert "chosen preferred in 50%, reward margin 0.0000" in text

    refused = {
        "BadSpec: --beta: Input should be greater than 0": ["--beta", "0"],
        "BadData: --data: chosen and rejected of every pair are equal": ["--max-seq-length", "1"],
        "BadSpec: training.objective: sft cannot learn from pairs": ["--objective", "sft", "--format", "preference"],
    }
    for words, options in refused.items():
        assert main([*command, *options]) in (64, 65)
        assert words in capsys.readouterr().err


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
