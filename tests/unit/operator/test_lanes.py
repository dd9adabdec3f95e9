"""What a namespace whose creates hang leaves to others."""

import pytest

from lora_operator.controller.lanes import HURRY, Lanes


def test_a_namespace_that_answers_has_all_workers() -> None:
    lanes = Lanes(8)
    assert [lanes.enter("a") for _ in range(8)] == [True] * 8
    assert lanes.patience("a") == HURRY


@pytest.mark.parametrize(("workers", "each", "all_slow"), [(8, 2, 4), (2, 1, 1), (1, 1, 1), (32, 8, 16)])
def test_slow_namespaces_have_few_workers(workers: int, each: int, all_slow: int) -> None:
    lanes = Lanes(workers)
    for namespace in "abcd":
        assert lanes.enter(namespace)
        lanes.leave(namespace, HURRY, answered=False)
        assert lanes.patience(namespace) is None, "it gets all the time that calls have"
    assert sum(lanes.enter("a") for _ in range(99)) == each
    assert sum(lanes.enter(namespace) for namespace in "bcd" for _ in range(99)) == all_slow - each
    assert lanes.enter("e"), "which holds up no other"
    lanes.leave("a", 10.0, answered=True)
    assert lanes.enter("a")
    assert not lanes.enter("a"), "slowly answered is slow"


def test_a_quick_launch_gives_the_workers_back() -> None:
    lanes = Lanes(4)
    assert lanes.enter("a")
    lanes.leave("a", HURRY, answered=False)
    assert lanes.enter("a")
    assert not lanes.enter("a")
    lanes.leave("a", 0.1, answered=True)
    assert [lanes.enter("a") for _ in range(4)] == [True] * 4
    assert lanes.patience("a") == HURRY
