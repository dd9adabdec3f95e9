"""The quality gate's decision, and metrics.jsonl."""

import json
import math
from typing import Any

import pytest

from lora_api.failures import RULES, FailureClass
from lora_api.publishing import Gate
from lora_api.served import Score, ServedEvaluation
from lora_trainer.errors import GateRefusedError, classify
from lora_trainer.evaluate import Evaluation
from lora_trainer.gate import Losses, choose_losses, decide_gate
from lora_trainer.metrics import pick, read_metrics, write_metrics

BOTH = Gate(min_eval_loss_improvement=0.5, max_eval_loss=1.0)
LEAST = Gate(min_eval_loss_improvement=0.5)
LARGEST = Gate(max_eval_loss=1.0)

GATES: dict[str, tuple[Gate | None, float | None, float | None, list[str] | None]] = {
    "no gate lets a worse adapter through": (None, 1.0, 9.0, None),
    "no gate needs no records": (None, None, None, None),
    "a large enough improvement passes": (LEAST, 2.0, 1.4, None),
    "exactly the improvement that is asked for passes": (LEAST, 2.0, 1.5, None),
    "too small an improvement is refused": (
        LEAST, 2.0, 1.6, ["2.0000 before", "1.6000 after", "better by 0.4000", "minEvalLossImprovement", "0.5"],
    ),
    "a worse adapter is refused": (LEAST, 2.0, 2.25, ["worse by 0.2500", "minEvalLossImprovement"]),
    "an improvement of 0 may be asked for": (Gate(min_eval_loss_improvement=0.0), 2.0, 2.0, None),
    "with 0 asked for, a worse one is refused": (Gate(min_eval_loss_improvement=0.0), 2.0, 2.1, ["worse by 0.1000"]),
    "the largest loss itself passes": (LARGEST, 3.0, 1.0, None),
    "a loss above the largest is refused": (LARGEST, 3.0, 1.01, ["maxEvalLoss allows 1", "1.0100 after"]),
    "both bounds can be missed at once": (BOTH, 2.0, 1.8, ["minEvalLossImprovement", "and publish.gate.maxEvalLoss"]),
    "one of two bounds is enough to refuse": (BOTH, 5.0, 1.2, ["maxEvalLoss"]),
    "a loss that is no number is refused": (LARGEST, 2.0, math.nan, ["maxEvalLoss"]),
    "an improvement over no number is refused": (LEAST, math.nan, 1.0, ["minEvalLossImprovement"]),
    "without losses it is refused": (LARGEST, None, None, ["no evaluation loss"]),
}  # fmt: skip


@pytest.mark.parametrize("case", GATES)
def test_the_gate_decides(case: str) -> None:
    gate, before, after, words = GATES[case]
    refusal = decide_gate(gate, Losses("training", before, after))
    if words is None:
        assert refusal is None
        return
    assert refusal is not None
    assert [word for word in words if word not in refusal] == []


SERVED = ServedEvaluation(dtype="bfloat16", records=256, all_records=900, before=Score(loss=3.0), after=Score(loss=1.5))
BASES: dict[str, tuple[Gate, ServedEvaluation | None, Losses]] = {
    "by default the base as it is served": (
        LARGEST, SERVED, Losses("served", 3.0, 1.5, " on the base as it is served (bfloat16, 256 of 900 records)"),
    ),
    "the base that was trained on, where that is asked for": (
        Gate(max_eval_loss=1.0, base="training"), SERVED,
        Losses("training", 2.0, 1.0, " on the base that was trained on"),
    ),
    "the base that was trained on, where the other was not measured": (
        Gate(max_eval_loss=1.0, base="served"), ServedEvaluation(dtype="bfloat16", problem="too large"),
        Losses("training", 2.0, 1.0, " on the base that was trained on (too large)"),
    ),
    "one base is both": (
        LARGEST, SERVED.model_copy(update={"same_base": True}), Losses("served", 2.0, 1.0),
    ),
    "without records there is nothing to tell apart": (LARGEST, None, Losses("training", 2.0, 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", BASES)
def test_the_gate_says_which_base_it_looks_at(case: str) -> None:
    gate, served, want = BASES[case]
    assert choose_losses(gate, 2.0, 1.0, served) == want


def test_a_refusal_names_the_base() -> None:
    refusal = decide_gate(LARGEST, choose_losses(LARGEST, 2.0, 1.0, SERVED))
    assert refusal is not None
    assert "loss on the base as it is served (bfloat16, 256 of 900 records) was 3.0000 before" in refusal


def test_one_bound_that_holds_is_not_named_in_a_refusal() -> None:
    assert "minEvalLossImprovement" not in (decide_gate(BOTH, Losses("training", 5.0, 1.2)) or "")


def test_a_refusal_is_final_and_has_an_exit_code_of_its_own() -> None:
    rule = RULES[classify(GateRefusedError("x"))]
    assert (rule.failure_class, rule.exit_code, rule.retried) == (FailureClass.GATE_REFUSED, 76, False)


HISTORY: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0, "epoch": 0.1, "learning_rate": 1e-3, "grad_norm": 0.5, "entropy": 3, "at": "A"},
    {"step": 2, "loss": math.nan, "grad_norm": math.inf, "tokens_per_second": 10.5},
    {"step": 2, "eval_loss": 1.5},
    {"step": 3, "loss": 1.0},
    {"step": 3, "train_runtime": 4.0, "train_loss": 1.5},
]


def test_metrics_are_one_json_object_a_line_in_the_order_of_steps() -> None:
    metrics = read_metrics(HISTORY, Evaluation(2.5, [], "B"), Evaluation(0.5, [], "C"), 3)
    lines = [json.loads(line) for line in write_metrics(metrics).splitlines()]
    assert lines == [
        {"step": 0, "eval_loss": 2.5, "at": "B"},
        {"step": 1, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "at": "A"},
        {"step": 2, "tokens_per_second": 10.5},
        {"step": 2, "eval_loss": 1.5},
        {"step": 3, "loss": 1.0},
        {"step": 3, "eval_loss": 0.5, "at": "C"},
    ]
    assert pick(metrics, "loss") == [(1, 2.0), (3, 1.0)]
    with pytest.raises(KeyError):
        pick(metrics, "lost")


def test_without_evaluation_records_there_are_only_steps() -> None:
    assert len(read_metrics(HISTORY[:1], Evaluation(None, []), Evaluation(None, []), 3)) == 1
    assert write_metrics([]) == ""
