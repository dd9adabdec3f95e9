"""What ranks tell each other, in a real gang of two processes."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from lora_trainer.exchange import broadcast_json, gather_json
from tests.trainer.gang import Case, run_cases

UNICODE = {"a": [1, 2.5, None, True], "größe": "\U0001f600" * 3}
EXCHANGES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "values of different lengths": ({"values": [UNICODE, []]}, [[UNICODE, []], UNICODE]),
    "a float to the bit": ({"values": [0.1 + 0.2, 1e-320]}, [[0.1 + 0.2, 1e-320], 0.1 + 0.2]),
    "more than there is room for, on rank 1": (
        {"values": ["a", "b" * 1000]},
        ["rank 1 has 1,002 bytes for the others; it may say 1 to 1,000 at once", "a"],
    ),
    "more than there is room for, on rank 0": (
        {"values": ["a" * 1000, "b"]},
        ["rank 0 has 1,002 bytes for the others; it may say 1 to 1,000 at once"] * 2,
    ),
    "nothing": (
        {"values": [0, 1], "strays": {"1": ""}},
        ["rank 1 has 0 bytes for the others; it may say 1 to 1,000 at once", 0],
    ),
}
"""Arguments of ``gang_work.exchange_json``, and what rank 0 finds gathered and broadcast."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """What both ranks found in each case."""
    cases = {name: arguments for name, (arguments, _) in EXCHANGES.items()}
    cases["a pickle"] = {"values": [0, 1], "strays": {"1": pickle.dumps([1, "said"]).hex()}}
    listed = [Case(str(number), "exchange_json", [0, 1], arguments) for number, arguments in enumerate(cases.values())]
    results = run_cases(listed, tmp_path_factory.mktemp("exchange"))
    return dict(zip(cases, results.values(), strict=True))


@pytest.mark.parametrize("case", EXCHANGES)
def test_every_rank_has_the_same_values_or_the_same_error(case: str, found: dict[str, list[list[Any]]]) -> None:
    assert found[case][0] == EXCHANGES[case][1]
    if "strays" not in EXCHANGES[case][0]:
        assert found[case][1] == found[case][0]


def test_a_pickle_of_a_peer_is_refused(found: dict[str, list[list[Any]]]) -> None:
    gathered, told = found["a pickle"][0]
    assert gathered.startswith("what rank 1 said to the others is no JSON: ")
    assert told == 0


def test_one_process_alone_hears_itself_as_a_gang_would(tmp_path: Path) -> None:
    assert gather_json((1, {"a": ()})) == [[1, {"a": []}]]
    assert broadcast_json((1, 2)) == [1, 2]
