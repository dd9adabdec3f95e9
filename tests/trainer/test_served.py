"""The adapter on its base as it is served: the manifest says what anybody measures with transformers and PEFT."""

import json
import math
import os
import re
import signal
import warnings
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_trainer.served
import lora_trainer.train
from lora_api.adapter import AdapterManifest
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer.errors import GateRefusedError
from lora_trainer.loss import IGNORED, add_token_scores
from lora_trainer.progress import Progress
from lora_trainer.served import free_memory
from lora_trainer.servedplan import ServedPlan
from lora_trainer.settings import Place
from lora_trainer.stop import StopRequest
from lora_trainer.store import Store, split_uri
from lora_trainer.train import train
from tests.support.families import build_config
from tests.support.tiny import make_model, make_rows, write_rows
from tests.trainer.gang import Case, run_cases
from tests.trainer.runs import Launched, build_run, merge

Make = Callable[..., RunSpec]
Results = dict[str, list[dict[str, Any]]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKEN = "<|done|>"
YES, NO = " yes", " no"


def make_answering_model(directory: Path) -> Path:
    """A tiny model that answers with YES before it is trained: each token of PROMPT's end and YES names the next one.

    Its embedding outweighs what its layers add, so that the head sees the last token alone.
    """
    make_model(directory, tied=False)
    network = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = make_rows(1)[0]["prompt"]
    ids = tokenizer(prompt + YES + tokenizer.eos_token)["input_ids"]
    chain = ids[len(tokenizer(prompt)["input_ids"]) - 1 :]
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        embedding, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
        embedding.mul_(10)
        for token, following in pairwise(chain):
            head[following] = embedding[token] / embedding[token].norm()
    network.save_pretrained(directory)
    return directory


def answered(rows: list[dict[str, str]], end: str = "") -> list[dict[str, str]]:
    """Two of three prompts have the answer that the model gives."""
    return [{**row, "completion": (NO if number % 3 == 2 else YES) + end} for number, row in enumerate(rows)]


def preferred(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    answers = [(row["prompt"], row["completion"]) for row in answered(rows)]
    return [{"prompt": prompt, "chosen": good, "rejected": NO if good == YES else YES} for prompt, good in answers]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_answering_model(tmp_path_factory.mktemp("model") / "answering")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with train.jsonl (48 rows) and eval.jsonl (12); below it the same as pairs, and with a new token."""
    directory = tmp_path_factory.mktemp("answers")
    for name, rows in (("train", make_rows(48)), ("eval", make_rows(12, start=200))):
        write_rows(directory / f"{name}.jsonl", answered(rows))
        write_rows(directory / "pairs" / f"{name}.jsonl", preferred(rows))
        write_rows(directory / "marked" / f"{name}.jsonl", answered(rows, TOKEN))
    return directory


TRAINING = {"training": {"maxSteps": 4, "learningRate": 0.01, "scheduler": "constant", "warmupRatio": 0.0}}
TWO, FSDP = {"nodes": 2}, {"nodes": 2, "strategy": "fsdp"}
CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "alone": (".", [0], {}),
    "alone, bfloat16": (".", [1], {"publish": {"servedDtype": "bfloat16"}}),
    "alone, offload": (".", [0], {"parallelism": {"cpuOffload": True}}),
    "fsdp": (".", [0, 1], {"parallelism": FSDP}),
    "fsdp, bfloat16": (".", [0, 1], {"parallelism": FSDP, "publish": {"servedDtype": "bfloat16"}}),
    "ddp": (".", [0, 1], {"parallelism": {"nodes": 2, "strategy": "ddp"}}),
    "fsdp, rank pattern": (".", [0, 1], {"parallelism": FSDP, "lora": {"rankPattern": {"q_proj": 2}}}),
    "fsdp, new tokens": ("marked", [0, 1], {"parallelism": FSDP, "lora": {"newTokens": [TOKEN]}}),
    "fsdp, dpo": ("pairs", [0, 1], {"parallelism": FSDP, "training": {"objective": "dpo"}}),
}


@pytest.fixture(scope="module")
def results(model: Path, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("served")
    cases = []
    for number, (name, (data, processes, changes)) in enumerate(CASES.items()):
        scratch = directory / str(number)
        run = build_run(model, answers / data, scratch, merge(TRAINING, changes))
        cases.append(Case(name, "train", processes, {"run": run.to_wire(), "directory": str(scratch)}))
    return run_cases(cases, directory / "cases")


def directory_of(uri: str) -> Path:
    return Path("/" + split_uri(uri)[1].lstrip("/"))


def manifest_of(uri: str) -> AdapterManifest:
    return AdapterManifest.model_validate_json((directory_of(uri) / "manifest.json").read_text())


# -- plain transformers and PEFT: nothing of ours


def load_plain(model: Path, dtype: torch.dtype, adapter: Path | None) -> Any:
    """The base in ``dtype``, not quantized, with the adapter in the same type, as inference servers hold it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if adapter is None:
        return base.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # nothing is merged here
        return PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()


def read_answers(network: Any, tokenizer: Any, rows: list[dict[str, str]], field: str = "completion") -> list[Any]:
    """For each row: log-probabilities of the answer's tokens, and whether each of them is the first choice."""
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row[field] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            table = network(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        wanted = ids[0, start:]
        found.append((table.gather(1, wanted[:, None]).squeeze(1), table.argmax(1) == wanted))
    return found


def measure_plain(model: Path, dtype: torch.dtype, adapter: Path | None, data: Path) -> tuple[float, float]:
    tokenizer = AutoTokenizer.from_pretrained(adapter if adapter and (adapter / "tokenizer.json").exists() else model)
    rows = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    found = read_answers(load_plain(model, dtype, adapter), tokenizer, rows)
    nats = -sum(float(values.sum()) for values, _ in found)
    return nats / sum(len(values) for values, _ in found), sum(bool(first.all()) for _, first in found) / len(rows)


@pytest.mark.parametrize("name", [name for name, (data, _, _) in CASES.items() if data != "pairs"])
def test_plain_transformers_and_peft_measure_what_the_manifest_says(
    results: Results, model: Path, answers: Path, name: str
) -> None:
    data, _, changes = CASES[name]
    uri = results[name][0]["adapter"]
    served = manifest_of(uri).served
    assert served is not None
    assert (served.problem, served.same_base, served.records, served.all_records) == (None, False, 12, 12)
    assert served.dtype == changes.get("publish", {}).get("servedDtype", "float32"), "float32 is the default on CPUs"
    loss, share = measure_plain(model, DTYPES[served.dtype], directory_of(uri), answers / data)
    assert served.after.loss == pytest.approx(loss, abs=1e-3)
    assert served.after.share == share == pytest.approx(0.0 if data == "marked" else 2 / 3)
    assert served.before.loss is not None
    assert served.before.loss > loss
    if data == ".":
        assert measure_plain(model, DTYPES[served.dtype], None, answers) == (
            pytest.approx(served.before.loss, abs=1e-3), served.before.share,
        )  # fmt: skip
    assert served.training.loss == pytest.approx(manifest_of(uri).eval_loss_after, abs=1e-9)
    assert abs(served.training.loss - served.after.loss) > 1e-4, "the base that was trained on is another one"


def test_the_gang_measures_what_one_process_measures(results: Results) -> None:
    alone = manifest_of(results["alone"][0]["adapter"]).served
    assert alone is not None
    for name in ("fsdp", "ddp", "alone, offload"):
        found = manifest_of(results[name][0]["adapter"]).served
        assert found is not None
        assert found.after.loss == pytest.approx(alone.after.loss, abs=1e-3), name
        assert found.after.share == alone.after.share, name


def test_preference_pairs_are_measured_against_the_base_as_it_is_served(
    results: Results, model: Path, answers: Path
) -> None:
    uri = results["fsdp, dpo"][0]["adapter"]
    served = manifest_of(uri).served
    assert served is not None
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (answers / "pairs" / "eval.jsonl").read_text().splitlines()]
    sums = {}
    for name, network in (("base", load_plain(model, torch.float32, None)),
                          ("adapter", load_plain(model, torch.float32, directory_of(uri)))):  # fmt: skip
        for field in ("chosen", "rejected"):
            found = read_answers(network, tokenizer, rows, field)
            sums[name, field] = torch.stack([values.sum() for values, _ in found])
    margin = 0.1 * (
        sums["adapter", "chosen"] - sums["base", "chosen"] - sums["adapter", "rejected"] + sums["base", "rejected"]
    )
    assert served.after.loss == pytest.approx(float(-logsigmoid(margin).mean()), abs=1e-3)
    assert served.after.share == pytest.approx(float((margin > 0).double().mean()))
    assert served.before.loss == pytest.approx(math.log(2), abs=1e-6)
    assert served.before.share == 0.5


# -- in this process


class Recorder(Progress):
    """Keeps what was reported of the base as it is served, and what was said to people."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.served: list[tuple[int, Any]] = []
        self.notes: list[str] = []
        self.stages: list[str] = []

    def stage(self, stage: Any) -> None:
        self.stages.append(stage)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def report_served(self, step: int, found: Any) -> None:
        self.served.append((step, found))


@pytest.fixture
def make(model: Path, answers: Path, tmp_path: Path) -> Make:
    return lambda **changes: build_run(model, answers, tmp_path, merge(TRAINING, changes))


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunSpec], tuple[AdapterStatus, Recorder]]:
    starts = iter(range(100))

    def start(run: RunSpec) -> tuple[AdapterStatus, Recorder]:
        monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / f"start-{next(starts)}"))
        recorder = Recorder()
        adapter = train(run, Place(0, 0, 1), StopRequest(), recorder)
        assert adapter is not None
        return adapter, recorder

    return start


Start = Callable[[RunSpec], tuple[AdapterStatus, Recorder]]


def test_of_many_records_some_are_measured_and_compared_with_the_same_ones(
    make: Make, run_here: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the twelve every third is measured: 0, 3, 6 and 9 have the answer that the model gives."""
    monkeypatch.setattr(lora_trainer.served.choose_part, "__defaults__", (4,))
    adapter, seen = run_here(make(publish={"gate": {"maxEvalLoss": 1.0}}))
    served = adapter.served
    assert served is not None
    assert (served.records, served.all_records) == (4, 12)
    assert (served.after.share, served.training.share) == (1.0, 1.0)
    assert adapter.eval_share_after == pytest.approx(2 / 3)
    assert served.training.loss != adapter.eval_loss_after
    assert adapter.gate_base == "served"
    assert seen.served == [(4, served)]
    card = Store(adapter.uri).get("README.md").decode()
    report = Store(adapter.uri).get("report.html").decode()
    for text in ("base weights as served (float32), 4 of 12 records", "100.0%", f"{served.after.loss:.4f}"):
        assert text in card
    assert "On 4 of 12 records, all three the same." in report
    assert "on the base as it is served (float32, 4 of 12 records): passed" in report
    assert f"the same bytes; evaluation loss {served.after.loss:.6f}" in report


def test_what_was_trained_on_unquantized_weights_is_not_measured_again(
    make: Make, run_here: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_trainer.train, "evaluate_served", None)
    adapter, seen = run_here(make(quantization={"type": "none"}, publish={"gate": {"maxEvalLoss": 50.0}}))
    served = adapter.served
    assert served is not None
    assert served.same_base
    assert served.after.loss == adapter.eval_loss_after
    assert adapter.gate_base == "served"
    assert any("is the one that is trained on" in note for note in seen.notes)


def test_unquantized_weights_of_another_type_are_measured(make: Make, run_here: Start) -> None:
    adapter, seen = run_here(make(quantization={"type": "none"}, publish={"servedDtype": "bfloat16"}))
    assert adapter.served is not None
    assert seen.stages[-5:] == ["evaluating", "evaluating", "evaluating", "publishing", "done"], "alive after loading"
    assert (adapter.served.same_base, adapter.served.dtype) == (False, "bfloat16")
    assert adapter.served.after.loss != adapter.eval_loss_after


def test_what_does_not_fit_is_said_and_the_gate_takes_the_base_that_was_trained_on(
    make: Make, run_here: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = "it needs 900.00 GiB of each process to be safe, and there are 1.00"
    monkeypatch.setattr(lora_trainer.train, "plan_served_run", lambda *_: ServedPlan("float32", problem=problem))
    run = make(publish={"gate": {"minEvalLossImprovement": 50.0}})
    with pytest.raises(GateRefusedError, match=r"on the base that was trained on \(it needs 900.00 GiB"):
        run_here(run)
    adapter, seen = run_here(make(publish={"gate": {"minEvalLossImprovement": 0.0}}))
    assert adapter.gate_base == "training"
    assert adapter.served is not None
    assert (adapter.served.problem, adapter.served.is_measured) == (problem, False)
    assert any(problem in note for note in seen.notes)
    for name in ("README.md", "report.html"):
        assert problem in Store(adapter.uri).get(name).decode()


def test_the_gate_looks_at_the_base_as_it_is_served_unless_it_is_told_otherwise(make: Make, run_here: Start) -> None:
    adapter, _ = run_here(make())
    served = adapter.served
    assert served is not None
    assert served.after.loss is not None
    assert adapter.eval_loss_after is not None
    low, high = sorted((served.after.loss, adapter.eval_loss_after))
    between = (low + high) / 2
    bases = {"served": None, "training": "training"}
    (passing,) = (base for base, loss in (("served", served.after.loss), ("training", adapter.eval_loss_after))
                  if loss == low)  # fmt: skip
    (refused,) = set(bases) - {passing}
    good, _ = run_here(
        make(uid="uid-2", publish={"name": "other", "gate": {"maxEvalLoss": between, "base": bases[passing]}})
    )
    assert good.gate_base == passing
    words = "as it is served" if refused == "served" else "that was trained on"
    with pytest.raises(GateRefusedError, match=words):
        run_here(make(uid="uid-3", publish={"gate": {"maxEvalLoss": between, "base": bases[refused]}}))


def test_the_trained_model_is_gone_before_the_served_one_is_loaded(
    make: Make, run_here: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[weakref.ref[torch.nn.Module]] = []
    load, spread = lora_trainer.served.load_served, lora_trainer.train.spread_model

    def note_model(model: torch.nn.Module, *rest: Any) -> None:
        trained.append(weakref.ref(model))
        trained.extend(weakref.ref(module) for module in model.modules())
        spread(model, *rest)

    def look(*arguments: Any) -> Any:
        assert trained
        assert [one() for one in trained if one() is not None] == []
        return load(*arguments)

    monkeypatch.setattr(lora_trainer.train, "spread_model", note_model)
    monkeypatch.setattr(lora_trainer.served, "load_served", look)
    adapter, _ = run_here(make())
    assert adapter.served is not None
    assert adapter.served.is_measured


def test_the_plan_knows_how_long_the_records_are_that_are_evaluated(
    make: Make, run_here: Start, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training records that are all shorter say nothing of them."""
    rows = make_rows(8, start=300)
    rows[3] = {**rows[3], "completion": " yes" * 40}
    data = write_rows(tmp_path / "long.jsonl", rows)
    lengths: list[int] = []

    def note_length(run: RunSpec, model: Path, longest: int, *_: Any) -> ServedPlan:
        lengths.append(longest)
        return ServedPlan("float32", problem="it is not looked at here")

    monkeypatch.setattr(lora_trainer.train, "plan_served_run", note_length)
    _, seen = run_here(make(dataset={"maxSeqLength": 100, "eval": {"uri": f"file://{data}"}}, training={"maxSteps": 1}))
    (trained,) = (int(said[1]) for note in seen.notes if (said := re.search(r"longest record has (\d+)", note)))
    assert trained < 40 < lengths[0]


def test_what_the_trained_model_had_is_given_back_on_the_gpu_and_on_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("device"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: given.append("host"))
    free_memory(torch.device("cuda"))
    free_memory(torch.device("cpu"))
    assert given == ["device", "host"]


def test_a_base_that_only_host_memory_holds_is_gathered_from_there(
    make: Make, run_here: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process alone has no group to shard in until then. CPUs offload from host memory to host memory."""
    plain, _ = run_here(make(publish={"name": "plain"}))
    plan = ServedPlan("float32", token_budget=64, offload=True)
    monkeypatch.setattr(lora_trainer.train, "plan_served_run", lambda *_: plan)
    try:
        found, _ = run_here(make())
    finally:
        torch.distributed.destroy_process_group()
    assert plain.served is not None
    assert found.served is not None
    assert found.served.after.loss == pytest.approx(plain.served.after.loss, abs=1e-5)
    assert found.served.after.share == plain.served.after.share
    assert found.served.before.loss == pytest.approx(plain.served.before.loss, abs=1e-5)


# -- stopped and killed


def test_a_run_that_is_killed_in_the_served_evaluation_trains_nothing_again(make: Make, fork: Any) -> None:
    """Its checkpoint is that of the last step: only the evaluations are repeated."""
    run = make(parallelism=TWO)
    hung: Launched = fork(run, "tests.trainer.entries:hang_in_the_served_evaluation")
    hung.wait_text("in the served evaluation")
    hung.process.kill()
    hung.wait()
    stopped: Launched = fork(
        run.model_copy(update={"attempt": 2}), "tests.trainer.entries:hang_in_the_served_evaluation"
    )
    stopped.wait_text("in the served evaluation")
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.wait(60) == 75, stopped.log.read_text()[-5000:]
    last: Launched = fork(run.model_copy(update={"attempt": 3}))
    assert last.wait() == 0, last.log.read_text()[-5000:]
    assert (stopped.losses, last.losses) == ({}, {})
    assert last.words.adapter is not None
    assert last.words.adapter.served is not None
    assert last.words.adapter.served.is_measured
    (line,) = (line for line in last.lines if line.event == "served")
    assert (line.served_loss, line.served_records) == (last.words.adapter.served.after.loss, 12)


# -- scores


@pytest.mark.parametrize("name", ["llama-3", "gemma-2", "mixtral"])
def test_scores_are_those_of_the_whole_logits(name: str) -> None:
    """Also of a family with a soft cap, whose head is not all."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(build_config(name)).eval().requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (3, 9), generator=generator)
    for place in range(1, ids.shape[1]):  # the first row has first choices alone
        ids[0, place] = network(input_ids=ids[:1, :place]).logits[0, -1].argmax()
    labels = ids.clone()
    labels[:, :4] = IGNORED
    labels[2, 7:] = IGNORED
    mask = torch.ones_like(ids)
    add_token_scores(network)
    with torch.no_grad():
        table = network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].double()
        found = network(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, score_tokens=True)
    learned = labels[:, 1:] != IGNORED
    wanted = table.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    assert torch.equal(found.supervised, learned)
    torch.testing.assert_close(found.losses.double(), -wanted[learned], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.first, (table.argmax(-1) == ids[:, 1:])[learned])
    assert found.first.any()
    assert not found.first.all()
