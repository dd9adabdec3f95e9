"""``evaluate`` measures a published adapter as its run did: the manifest's figure, whatever the run was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_api.adapter import MANIFEST_FILE, AdapterManifest
from lora_api.run import RunSpec
from lora_api.training import DPO
from lora_trainer.cli import main
from lora_trainer.errors import BadSpecError, TrainerError
from lora_trainer.measure import measure
from lora_trainer.progress import Progress
from lora_trainer.settings import Place
from lora_trainer.stop import StopRequest
from lora_trainer.store import split_uri
from lora_trainer.train import train
from lora_trainer.yardstick import Changes, Yardstick, apply_changes, describe_yardstick, find_yardstick
from tests.support.tiny import make_rows, write_rows
from tests.trainer.runs import build_run, merge

TOKEN = "<|shout|>"


def as_turns(row: dict[str, str]) -> dict[str, Any]:
    question, answer = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})
    return {"messages": [question, answer, question, answer]}


ROWS: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "plain": lambda row: row,
    "renamed": lambda row: {"question": row["prompt"], "answer": row["completion"]},
    "turns": as_turns,
    "pairs": lambda row: {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"},
    "marked": lambda row: {"prompt": TOKEN + row["prompt"], "completion": row["completion"]},
    "text": lambda row: {"text": row["prompt"] + row["completion"]},
}
SPLIT = {"eval": None, "evalFraction": 0.3}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft, cut": ("plain", {"dataset": {"maxSeqLength": 18}}),
    "sft, held out": ("plain", {"dataset": SPLIT, "quantization": {"doubleQuant": False}}),
    "packed, columns": (
        "renamed", {"dataset": {"packing": True, "columns": {"prompt": "question", "completion": "answer"}}}),
    "the assistant's turns, a system prompt": (
        "turns", {"dataset": {"assistantOnlyLoss": True, "systemPrompt": "shout"}, "quantization": {"type": "none"}}),
    "dpo, held out": (
        "pairs",
        {"dataset": SPLIT, "training": {"objective": "dpo", "dpo": {"beta": 0.5, "labelSmoothing": 0.1, "loss": "ipo"}}}
    ),
    "new tokens": ("marked", {"lora": {"newTokens": [TOKEN]}}),
    "text, rsLoRA": ("text", {"lora": {"useRslora": True, "r": 6}, "dataset": SPLIT}),
}  # fmt: skip


@pytest.fixture
def publish(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunSpec, Path]]:
    """Trains a run in this process, and tells where its adapter is."""

    def start(rows: str, changes: dict[str, Any]) -> tuple[RunSpec, Path]:
        monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / "state"))
        monkeypatch.setenv("LORA_WORK", str(tmp_path))
        for name, made in (("train", make_rows(48)), ("eval", make_rows(9, start=200))):
            write_rows(tmp_path / f"{name}.jsonl", [ROWS[rows](row) for row in made])
        run = build_run(model, tmp_path, tmp_path, merge({"training": {"learningRate": 0.05}}, changes))
        adapter = train(run, Place(0, 0, 1), StopRequest(), Progress(enabled=False))
        assert adapter is not None
        return run, Path("/" + split_uri(adapter.uri)[1].lstrip("/"))

    return start


@pytest.mark.parametrize("case", RUNS)
def test_evaluate_gives_the_figures_of_the_manifest(
    case: str, publish: Callable[..., tuple[RunSpec, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, directory = publish(*RUNS[case])
    manifest = AdapterManifest.model_validate_json((directory / MANIFEST_FILE).read_text())
    capsys.readouterr()
    assert main(["evaluate", "--adapter", f"file://{directory}", "--max-new-tokens", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evalLoss"] == pytest.approx(manifest.eval_loss_after, abs=1e-5)
    assert found["yardstick"] == "the run's own yardstick"
    before = measure(adapter=f"file://{directory}", base_only=True, max_new_tokens=1)
    assert before.records == found["records"]
    if not run.lora.new_tokens:  # whose rows begin otherwise in a run than they are in the base model
        assert before.loss == pytest.approx(manifest.eval_loss_before, abs=1e-5)
    assert abs(before.loss - found["evalLoss"]) > 1e-3


def test_what_is_given_wins_and_is_said(publish: Callable[..., tuple[RunSpec, Path]], tmp_path: Path) -> None:
    _, directory = publish("plain", {"dataset": {"maxSeqLength": 24}})
    own = measure(adapter=f"file://{directory}", max_new_tokens=1)
    other = measure(adapter=f"file://{directory}", quantization="none", max_seq_length=64, max_new_tokens=1, limit=5)
    assert other.yardstick == (
        "the run's own yardstick, but for --max-seq-length, --quantization, on at most 5 records"
    )
    assert other.records == 5
    assert other.to_text(0).splitlines()[1] == f"measured by {other.yardstick}"
    assert other.loss != pytest.approx(own.loss, abs=1e-4)
    (directory / MANIFEST_FILE).unlink()
    with pytest.raises(BadSpecError, match=r"--model: is needed: .*there is no manifest\.json beside the adapter"):
        measure(adapter=f"file://{directory}")


def manifest_of(run: RunSpec, **changes: Any) -> dict[str, Any]:
    file = {"path": "adapter_config.json", "size": 1, "sha256": "a" * 64}
    return {
        "digest": "sha256:" + "a" * 64, "name": "tiny", "namespace": "tests", "baseModel": "m", "rank": 4,
        "files": [file], "createdAt": "2026-11-29T00:00:00Z", "yardstick": describe_yardstick(run), **changes,
    }  # fmt: skip


def find(tmp_path: Path, manifest: Any) -> Yardstick:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    return find_yardstick(tmp_path)


def test_a_manifest_of_another_release_is_read_as_far_as_it_goes(
    tmp_path: Path, make_run: Callable[..., RunSpec]
) -> None:
    run = make_run(dataset={"chatTemplate": "x" * 900})
    own = describe_yardstick(run)
    assert "chatTemplate" not in own["dataset"]
    newer = {**own, "later": 1, "dataset": {**own["dataset"], "later": {"a": 1}}}
    assert find(tmp_path, manifest_of(run, yardstick=newer)) == find(tmp_path, manifest_of(run))
    earlier = find(tmp_path, {name: value for name, value in manifest_of(run).items() if name != "yardstick"})
    assert earlier == Yardstick(earlier.name)
    assert "of an earlier release, which has none" in earlier.name
    odd = find(tmp_path, manifest_of(run, yardstick={**own, "tokenBudget": "many"}))
    assert odd.name.endswith("cannot be understood here (tokenBudget)")
    assert find_yardstick(None).name.endswith("no adapter was given")


def test_a_run_of_pairs_is_measured_on_pairs_whether_or_not_it_has_settings_of_its_own(
    tmp_path: Path, make_run: Callable[..., RunSpec]
) -> None:
    assert find(tmp_path, manifest_of(make_run(training={"objective": "dpo"}))).dpo == DPO()
    own = make_run(training={"objective": "dpo", "dpo": {"beta": 0.3}})
    assert find(tmp_path, manifest_of(own)).dpo == DPO(beta=0.3)
    assert find(tmp_path, manifest_of(make_run())).dpo is None


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no records": ({"dataset": {"eval": None, "evalFraction": 0.0}}, {}, r"--data: is needed: the run had no evaluat"),
    "a number out of its range": ({}, {"objective": "dpo", "dpo": {"beta": -1.0}}, r"--beta: Input should be greater"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_said_with_its_remedy(
    case: str, tmp_path: Path, make_run: Callable[..., RunSpec]
) -> None:
    changes, given, words = REFUSED[case]
    with pytest.raises(TrainerError, match=words):
        apply_changes(find(tmp_path, manifest_of(make_run(**changes))), Changes(**given))


def test_changes_that_change_nothing_leave_the_name(tmp_path: Path, make_run: Callable[..., RunSpec]) -> None:
    run = make_run(training={"objective": "dpo", "dpo": {"beta": 0.3}})
    own = find(tmp_path, manifest_of(run))
    assert run.dataset.eval is not None
    same = Changes(
        model=run.base_model.uri, data=run.dataset.eval.uri, quantization="nf4", max_seq_length=64, objective="dpo"
    )
    assert apply_changes(own, same) == own
    other = apply_changes(own, Changes(dpo={"beta": 0.1}))
    assert (other.dpo and other.dpo.beta, other.name) == (0.1, "the run's own yardstick, but for --objective")
    assert apply_changes(own, Changes(objective="sft")).dpo is None
    elsewhere = apply_changes(own, Changes(data="file:///elsewhere.jsonl"))
    assert elsewhere.data is not None
    assert (elsewhere.data.uri, elsewhere.fraction) == ("file:///elsewhere.jsonl", None)
