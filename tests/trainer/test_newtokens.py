"""lora.newTokens: rows that learn the same under every parallelism, and are published in a form that others load."""

import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from lora_api.failures import FailureClass
from lora_api.run import RunSpec
from lora_api.status import AdapterStatus
from lora_trainer.adapter import expected_shapes
from lora_trainer.cli import main
from lora_trainer.errors import BadDataError, BadSpecError, InternalError
from lora_trainer.loss import LogitTransform, TokenLosses
from lora_trainer.model import add_adapter, load_base_model, load_tokenizer
from lora_trainer.newtokens import NewTokens, Unseen, add_tokens, read_tokenizer
from lora_trainer.objectives import build_trainer
from lora_trainer.preflight import preflight
from lora_trainer.prepare import prepare_data
from lora_trainer.progress import Progress
from lora_trainer.rows import add_rows, find_rows, read_rows, row_parameters, row_tensors
from lora_trainer.settings import Place
from lora_trainer.sources import Sources
from lora_trainer.stop import StopRequest
from lora_trainer.store import split_uri
from lora_trainer.train import train
from tests.support.tiny import make_model, make_rows, write_rows
from tests.trainer.gang import Case, run_cases
from tests.trainer.runs import Launched, build_run, merge

Make = Callable[..., RunSpec]
TOKENS = ["<|shout|>", "<|done|>"]
CPU = torch.device("cpu")
STEPS = 4


def with_tokens(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Questions that begin with the first token, answers that end with the second."""
    return [{"prompt": TOKENS[0] + row["prompt"], "completion": row["completion"] + TOKENS[1]} for row in rows]


def with_answers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same as preference pairs."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" no{TOKENS[1]}"}
        for row in with_tokens(rows)
    ]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with train.jsonl and eval.jsonl, and in pairs/ the same as pairs."""
    directory = tmp_path_factory.mktemp("marked")
    for name, rows in (("train", make_rows(48)), ("eval", make_rows(9, start=200))):
        write_rows(directory / f"{name}.jsonl", with_tokens(rows))
        write_rows(directory / "pairs" / f"{name}.jsonl", with_answers(rows))
    return directory


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied") / "model", tied=False)


@pytest.fixture(params=["tied", "untied"])
def base(request: pytest.FixtureRequest, model: Path, untied: Path) -> Path:
    return model if request.param == "tied" else untied


@pytest.fixture
def make_run(model: Path, marked: Path, tmp_path: Path) -> Make:
    return lambda **changes: build_run(model, marked, tmp_path, merge({"lora": {"newTokens": TOKENS}}, changes))


def run_here(run: RunSpec, work: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterStatus:
    """Trains in this process."""
    monkeypatch.setenv("LORA_STATE_DIR", str(work))
    found = train(run, Place(0, 0, 1), StopRequest(), Progress(enabled=False))
    assert found is not None
    return found


def load_adapter(base: Any, directory: Path) -> Any:
    """PEFT says of tied weights that merging them may go wrong; nothing is merged here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(base, directory)


def directory_of(uri: str) -> Path:
    return Path("/" + split_uri(uri)[1].lstrip("/"))


# -- every parallelism

WAYS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "alone": ([0], {}),
    "alone-offload": ([1], {"cpuOffload": True}),
    "ddp-2": ([2, 3], {"strategy": "ddp"}),
    "fsdp-2": ([0, 1], {"strategy": "fsdp"}),
    "hsdp-2x2-offload": ([0, 1, 2, 3], {"strategy": "hsdp", "shardSize": 2, "cpuOffload": True}),
}
GANG = {"untied": list(WAYS), "tied": ["alone", "fsdp-2"], "dpo": ["alone", "ddp-2", "fsdp-2"]}
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(model: Path, untied: Path, marked: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("gang")
    cases = []
    for kind, names in GANG.items():
        for name in names:
            processes, parallelism = WAYS[name]
            own = directory / f"{kind}-{name}"
            changes = {
                "lora": {"newTokens": TOKENS},
                "parallelism": {"nodes": len(processes), **parallelism},
                "training": {
                    "objective": "dpo" if kind == "dpo" else "sft",
                    "maxSteps": STEPS,
                    "microBatchSize": 1,
                    "maxGradNorm": 0.3,
                    "weightDecay": 0.1,
                },
            }
            data = marked / "pairs" if kind == "dpo" else marked
            run = build_run(model if kind == "tied" else untied, data, own, changes).to_wire()
            cases.append(Case(own.name, "train", processes, {"run": run, "directory": str(own)}))
    return run_cases(cases, directory)


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, name) for kind, names in GANG.items() for name in names if name != "alone"]
)
def test_rows_learn_what_one_process_learns(kind: str, case: str, results: Results) -> None:
    (alone,) = results[f"{kind}-alone"]
    assert any(norm > 0.3 for norm in alone["norms"].values()), "no gradient is clipped, rows and all"
    for rank in results[f"{kind}-{case}"]:
        assert len(rank["losses"]) == STEPS
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert rank["norms"] == pytest.approx(alone["norms"], abs=1e-4)
    expected, found = (load_weights(results[f"{kind}-{name}"][0]["adapter"]) for name in ("alone", case))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def load_weights(uri: str) -> dict[str, torch.Tensor]:
    return load_file(directory_of(uri) / "adapter_model.safetensors")


def test_tied_rows_are_one_and_untied_ones_are_not(results: Results) -> None:
    for kind, same in (("tied", True), ("untied", False)):
        tensors = load_weights(results[f"{kind}-alone"][0]["adapter"])
        embedding = tensors["base_model.model.model.embed_tokens.lora_embedding_B"]
        head = tensors["base_model.model.lm_head.lora_A.weight"]
        scale = 8 / 4  # it is in that matrix of each pair which learns in other modules: B
        assert torch.allclose(embedding.T * scale, head) == same


# -- what is published


def test_others_load_what_was_trained(
    base: Path, make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT, transformers (merged), and our own evaluation of the files: the losses and logits are the same."""
    changes = {"baseModel": {"uri": f"file://{base}"}, "quantization": {"type": "none"}, "publish": {"mergeBase": True}}
    run = make_run(**changes, training={"maxSteps": 12}, lora={"r": 1, "alpha": 3})
    found = run_here(run, tmp_path / "work", monkeypatch)
    adapter, merged = directory_of(found.uri), directory_of(str(found.merged_uri))
    assert (found.rank, found.serving_max_lora_rank) == (2, 8), "the rank holds both tokens"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {"embed_tokens", "lm_head"} < set(config["target_modules"])
    assert (config["modules_to_save"], config["trainable_token_indices"]) == (None, None)

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer(with_tokens(make_rows(2))[0]["prompt"] + TOKENS[1], return_tensors="pt").input_ids
    assert {400, 401} <= set(ids.flatten().tolist())
    assert AutoTokenizer.from_pretrained(merged)(TOKENS[0]).input_ids == [400]
    template = AutoTokenizer.from_pretrained(base).chat_template
    assert template is not None
    for directory in (adapter, merged):
        assert AutoTokenizer.from_pretrained(directory).chat_template == template
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = plain(ids).logits
        by_peft = load_adapter(plain, adapter)(ids).logits
        by_merge = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert float((by_peft - before)[..., 401].abs().max()) > 0.1, "the head's row must matter"
    torch.testing.assert_close(by_merge, by_peft, atol=1e-5, rtol=0)

    capsys.readouterr()
    data = str(run.dataset.eval.uri) if run.dataset.eval else ""
    arguments = ["--model", f"file://{base}", "--adapter", found.uri, "--data", data, "--quantization", "none"]
    assert main(["evaluate", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evalLoss"] == pytest.approx(found.eval_loss_after, abs=1e-4)


def test_a_model_learns_to_write_a_new_token(make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's row of an added token begins as the mean of all, which is never the best choice."""
    run = make_run(training={"maxSteps": 60, "learningRate": 0.02})
    found = run_here(run, tmp_path / "work", monkeypatch)
    base = load_base_model(directory_of(run.base_model.uri), run.quantization, CPU)
    model = load_adapter(base, directory_of(found.uri))
    tokenizer = AutoTokenizer.from_pretrained(directory_of(found.uri))
    ids = tokenizer(with_tokens(make_rows(1, start=200))[0]["prompt"], return_tensors="pt").input_ids
    written = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert TOKENS[1] in tokenizer.decode(written)


def test_reserved_tokens_need_no_other_tokenizer(
    marked: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in TOKENS])
    tokenizer.save_pretrained(own)
    run = build_run(own, marked, tmp_path, {"lora": {"newTokens": TOKENS}})
    found = run_here(run, tmp_path / "work", monkeypatch)
    assert not list(directory_of(found.uri).glob("tokenizer*"))
    assert f"`{TOKENS[0]}`" in (directory_of(found.uri) / "README.md").read_text()


def test_killed_and_started_again_it_publishes_the_same_bytes(make_run: Make, fork: Callable[..., Launched]) -> None:
    run = make_run(parallelism={"nodes": 2}, training={"maxSteps": 12}, checkpoint={"everySteps": 2})
    first = fork(run)
    first.wait_step(5)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    second = fork(run.model_copy(update={"attempt": 2}))
    assert second.wait() == 0, second.log.read_text()[-5000:]
    whole = fork(run.model_copy(update={"uid": "whole"}))
    assert whole.wait() == 0, whole.log.read_text()[-5000:]
    assert min(second.losses) > 1
    assert second.words.adapter is not None
    assert whole.words.adapter is not None
    assert second.words.adapter.digest == whole.words.adapter.digest


# -- parts


def prepared(base: Path, tokens: NewTokens) -> PeftModel:
    spec = build_run(base, base, base, {})
    model = add_adapter(load_base_model(base, spec.quantization, CPU), spec.lora, 1)
    add_rows(model, tokens)
    return model


def test_added_tokens_begin_as_the_mean_and_reserved_ones_as_they_are(base: Path) -> None:
    model = prepared(base, NewTokens(ids=(400, 7), added=(400,)))
    learned = find_rows(model)
    assert learned is not None
    for module in (learned.embedding, learned.head):
        weight = module.base.weight
        torch.testing.assert_close(weight[400] + module.rows[0], weight.mean(0))
        assert not module.rows[1].any()
    assert learned.shapes == {name: tuple(tensor.shape) for name, tensor in row_tensors(train_rows(model)).items()}
    assert learned.shapes.items() <= expected_shapes(model).items()


def test_rows_have_a_group_of_their_own_without_weight_decay(untied: Path, marked: Path, tmp_path: Path) -> None:
    """torch's fused kernels take no group in which some parameters are sharded and some are whole."""
    run = build_run(untied, marked, tmp_path, {"lora": {"newTokens": TOKENS}, "training": {"weightDecay": 0.1}})
    tokenizer, tokens = read_tokenizer(run, untied)
    model = add_adapter(load_base_model(untied, run.quantization, CPU), run.lora, 1)
    add_rows(model, tokens)
    sources = Sources(untied, [marked / "train.jsonl"], None)
    data = prepare_data(run, sources, tokenizer, Place(0, 0, 1), tmp_path / "data")
    trainer = build_trainer(run, model, tokenizer, data, CPU, tmp_path / "out", [])
    trainer.create_optimizer()
    groups = [(set(group["params"]), group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert [decay for parameters, decay in groups if parameters & row_parameters(model)] == [0.0]
    assert [parameters for parameters, decay in groups if not decay] == [row_parameters(model)]


def train_rows(model: PeftModel) -> Any:
    """As if each row had learned something."""
    learned = find_rows(model)
    assert learned is not None
    with torch.no_grad():
        for module in (learned.embedding, learned.head):
            module.rows.add_(torch.randn(module.rows.shape, generator=torch.Generator().manual_seed(3)))
    return learned


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "one is missing": (lambda t: t.pop("base_model.model.lm_head.lora_A.weight"), "has no base_model.model.lm_head"),
    "another row of the head": (lambda t: t["base_model.model.lm_head.lora_B.weight"][9].fill_(1.0), "other rows"),
    "another row of the embedding": (
        lambda t: t["base_model.model.model.embed_tokens.lora_embedding_A"][:, 9].fill_(1.0),
        "other rows",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_rows_are_not_what_was_trained(case: str, model: Path) -> None:
    learned = train_rows(prepared(model, NewTokens(ids=(400, 7))))
    tensors = row_tensors(learned)
    for rows, module in zip(read_rows(learned, tensors, 1.0), (learned.embedding, learned.head), strict=True):
        torch.testing.assert_close(rows, module.rows.detach())
    damage, words = DAMAGES[case]
    damage(tensors)
    with pytest.raises(InternalError, match=words):
        read_rows(learned, tensors, 1.0)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_rows_that_were_not_trained_are_not_published(value: float, untied: Path) -> None:
    learned = train_rows(prepared(untied, NewTokens(ids=(400, 7))))
    with torch.no_grad():
        learned.embedding.rows.zero_()
        row_tensors(learned)  # a token at the end of every answer is never read
        learned.head.rows.fill_(value)
    with pytest.raises(InternalError, match=r"rows of lora\.newTokens are zero or not finite"):
        row_tensors(learned)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=3.0)])
def test_the_losses_have_the_gradients_of_the_losses_written_out(transform: LogitTransform) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(90, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    rows = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(40, generator=generator, dtype=torch.float64)
    ids, labels = torch.tensor([39, 2, 17]), torch.randint(0, 40, (90,), generator=generator)

    shares = torch.randn(90, generator=generator)

    def gradients(loss_of: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [one.clone().requires_grad_() for one in (hidden, rows)]
        losses = loss_of(*inputs)
        found = torch.autograd.grad((losses * shares).sum(), inputs)
        return [losses.detach().double(), *(gradient.double() for gradient in found)]

    def written_out(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = transform.scale * nn.functional.linear(hidden, weight.index_add(0, ids, rows), bias)
        if transform.softcap is not None:
            logits = transform.softcap * torch.tanh(logits / transform.softcap)
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    found = gradients(lambda h, r: TokenLosses.apply(h, weight, bias, labels, transform, r, ids))
    for one, other in zip(found, gradients(written_out), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


WRONG: dict[str, tuple[list[str], int, str]] = {
    "the first token": (["<s>"], 512, "<s> is the tokenizer's bos_token already"),
    "ordinary text": (["one"], 512, "one is a piece of ordinary text .* such as <|one|>"),
    "no room": (
        ["<|a|>", "<|b|>"],
        401,
        "401 rows and its tokenizer 400 tokens, .* room for 1 .* 2 are asked for; leave",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tokens_that_have_no_row_are_refused(case: str, model: Path) -> None:
    tokens, rows, words = WRONG[case]
    with pytest.raises(BadSpecError, match=words.replace("|", r"\|")):
        add_tokens(load_tokenizer(model), tokens, rows)


def test_reserved_tokens_are_proposed_where_no_row_is_left(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([AddedToken(f"<|reserved_{number}|>", special=True) for number in range(4)])
    with pytest.raises(BadSpecError, match=r"take reserved ones instead, such as <\|reserved_1\|>, <\|reserved_2\|>"):
        add_tokens(tokenizer, ["<|x|>"], 404)
    assert add_tokens(tokenizer, ["<|reserved_2|>", "<|y|>"], 406) == NewTokens((402, 405), (405,))


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_token_that_no_record_has_is_told(
    objective: str, model: Path, marked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"lora": {"newTokens": [*TOKENS, "<|nowhere|>"]}, "training": {"objective": objective}}
    run = build_run(model, marked / "pairs" if objective == "dpo" else marked, tmp_path, changes)
    with pytest.raises(BadDataError, match=r"no training record has <\|nowhere\|>"):
        run_here(run, tmp_path / "work", monkeypatch)
    unseen = Unseen(load_tokenizer(directory_of(run.base_model.uri)), ["</s>"])
    unseen.see(np.array([5, 2], dtype=np.int32))
    unseen.check()


def test_preflight_warns_of_the_cost_and_refuses_what_has_no_row(make_run: Make, model: Path, tmp_path: Path) -> None:
    def check(run: RunSpec, name: str) -> Any:
        return preflight(json.dumps(run.to_wire()), "run.json", tmp_path / name)

    found = check(make_run(), "good")
    assert found.outcome == "passed", found.problems
    (warning,) = [text for text in found.warnings if "lora.newTokens" in text]
    assert "lora.newTokens (2): their rows of embedding and output head are trained too" in warning
    assert "tokenizer that is published beside it" in warning
    wrong = check(make_run(lora={"newTokens": ["</s>"]}), "wrong")
    assert [(one.failure_class, "lora.newTokens" in one.message) for one in wrong.problems] == [
        (FailureClass.BAD_SPEC, True)
    ]
