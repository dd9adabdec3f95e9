"""Every way of training, with the types and the copies of a GPU."""

from typing import Any

import pytest

from lora_trainer.varlen import VARLEN
from tests.gputypes.conftest import LAST_STEP
from tests.gputypes.table import ROWS, Row

Results = dict[str, list[dict[str, Any]]]

LOSS, EVALUATION = 1e-3, 2e-3
"""Nats per token. Phi-MoE draws its experts at random in training, on each process for itself: 3e-4 and 1e-3. All
others are within 1e-6."""
LOGIT = 1e-2
SERVED = 0.1
"""Nats between the base that was trained on and the one that is served: what quantization changes."""
UNPLANNED = ("phi-2", "phi-3.5-moe")
"""Families that the memory plan does not know. So it is said that they were not measured as served."""


def look(results: Results, row: Row) -> list[dict[str, Any]]:
    """What the ranks saw of a run that ended well."""
    for rank in results[row.name]:
        assert "error" not in rank, f"{rank['error']}\n{rank['trace'][-3000:]}"
    return results[row.name]


@pytest.mark.parametrize("name", ROWS)
def test_it_trains(name: str, results: Results) -> None:
    row = ROWS[name]
    for rank in look(results, row):
        done = LAST_STEP if row.resumed else 0
        assert list(map(int, rank["losses"])) == list(range(done + 1, row.changes()["training"]["maxSteps"] + 1))
        assert rank["answers"] > 0
        assert "torch.bfloat16" in rank["types"]
        assert rank["learns"] == ["torch.float32"], "TRL makes it bfloat16 where the base is quantized"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.strategy != "alone" or row.resumed])
def test_its_losses_are_those_of_one_process(name: str, results: Results) -> None:
    row = ROWS[name]
    (alone,) = look(results, row.alone)
    for rank in look(results, row):
        assert rank["losses"] == pytest.approx({step: alone["losses"][step] for step in rank["losses"]}, abs=LOSS)
        assert rank["evals"] == pytest.approx({step: alone["evals"][step] for step in rank["evals"]}, abs=EVALUATION)


@pytest.mark.parametrize("name", ROWS)
def test_peft_loads_what_it_published(name: str, results: Results) -> None:
    rank = look(results, ROWS[name])[0]
    assert rank["difference"] <= LOGIT
    assert rank["learned"] > LOGIT, "nothing was learned that could differ"


@pytest.mark.parametrize("name", ROWS)
def test_it_is_measured_on_the_base_as_it_is_served(name: str, results: Results) -> None:
    row = ROWS[name]
    for rank in look(results, row):
        served = rank["served"]
        assert served["dtype"] == "bfloat16"
        if row.family in UNPLANNED:
            assert served["problem"] == "how much memory this architecture needs is not known"
            continue
        assert served["after"]["loss"] == pytest.approx(served["training"]["loss"], abs=SERVED)
        assert served["after"]["loss"] != served["before"]["loss"]
        assert served["sameBase"] == (row.quantization == "none"), "it is in bfloat16 already"
        assert rank.get("kept", []) == [], "the trained model has to go before the served one comes"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.objective == "packing"])
def test_packed_rows_need_no_mask(name: str, results: Results) -> None:
    for rank in look(results, ROWS[name]):
        assert rank["attention"] == VARLEN


@pytest.mark.parametrize("name", ROWS)
def test_nobody_else_wraps_the_model(name: str, results: Results) -> None:
    for rank in look(results, ROWS[name]):
        assert rank["wrapped"] == 0, "DDP"
        assert rank["prepared"] == 0, "accelerate's autocast"


@pytest.mark.parametrize("name", ROWS)
def test_every_pass_is_under_autocast(name: str, results: Results) -> None:
    """Those of training, also where layers are computed again, of evaluations, answers and preferences' reference."""
    for rank in look(results, ROWS[name]):
        assert rank["autocast"] == [True]


@pytest.mark.parametrize("name", ROWS)
def test_a_fresh_adapter_is_measured_after_training_as_it_was_before(name: str, results: Results) -> None:
    for rank in look(results, ROWS[name]):
        assert rank["again"] == rank["before"], "to the bit"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.strategy == "ddp"])
def test_gradients_are_averaged_once(name: str, results: Results) -> None:
    for rank in look(results, ROWS[name]):
        assert rank["averaged_before"] is False


def test_host_memory_has_a_group_of_its_own(results: Results) -> None:
    for rank in results["talk"]:
        start, gathered, told, summed, meshed = rank["counts"]
        assert [b - a for a, b in zip(start, gathered, strict=True)] == [0, 2], "a length, and the bytes"
        assert [b - a for a, b in zip(gathered, told, strict=True)] == [0, 2]
        assert [b - a for a, b in zip(told, summed, strict=True)] == [1, 0], "sums are on the training device"
        assert meshed[1] == summed[1], "and meshes are not made of it"
        assert rank["sizes"] == [2, 2]
