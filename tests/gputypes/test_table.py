"""The table has every value of each axis once, and every pair that the strategies must not get wrong."""

from itertools import product

from tests.gputypes.table import OBJECTIVES, PARALLELISM, QUANTIZATIONS, ROWS
from tests.support.families import FAMILIES

ROW_LIST = list(ROWS.values())


def test_every_strategy_has_every_objective_and_every_quantization() -> None:
    for strategy in PARALLELISM:
        rows = [row for row in ROW_LIST if row.strategy == strategy]
        assert {row.objective for row in rows} == set(OBJECTIVES)
        assert {row.quantization for row in rows} == set(QUANTIZATIONS)
        assert any(row.resumed for row in rows)


def test_every_family_is_trained_alone_and_sharded() -> None:
    assert {(row.family, row.strategy) for row in ROW_LIST} >= set(product(FAMILIES, ("alone", "fsdp")))


def test_each_row_can_be_compared_with_one_process() -> None:
    assert {row.alone.name for row in ROW_LIST} <= set(ROWS)
    assert {row.processes for row in ROW_LIST} == {1, 2, 4}
    assert len(ROWS) == len({row.name for row in ROW_LIST})


def test_evaluation_samples_checkpoints_and_resumed_runs_are_as_users_have_them() -> None:
    for row in ROW_LIST:
        changes = row.changes()
        assert changes["dataset"]["eval"] is None, "evalFraction's default holds records out"
        assert "evalFraction" not in changes["dataset"]
        assert changes["checkpoint"]["everySteps"] <= changes["training"]["maxSteps"]
