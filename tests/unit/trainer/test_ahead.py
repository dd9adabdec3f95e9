"""Batches that are made ahead: the same ones, in time, never many, and none that is lost."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_trainer.ahead import Ahead

SECONDS = 10.0


@pytest.fixture
def maker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("items", [0, 1, 3, 4, 8, 9])
@pytest.mark.parametrize("block", [1, 3, 4, 20])
def test_items_come_in_their_order_and_all_of_them(items: int, block: int, maker: ThreadPoolExecutor) -> None:
    ahead = Ahead(iter(range(items)), block, maker)
    assert list(ahead) == list(range(items))
    assert list(ahead) == []


class Source(Iterator[int]):
    """Counts; knows who asked for each number, and says when a number is made."""

    def __init__(self, fails_at: int = -1) -> None:
        self.makers: list[int] = []
        self.made = {number: threading.Event() for number in range(12)}
        self._fails_at = fails_at

    def __next__(self) -> int:
        number = len(self.makers)
        if number == self._fails_at:
            raise OSError("the disk is gone")
        self.makers.append(threading.get_ident())
        self.made[number].set()
        return number


def test_the_next_block_is_made_while_this_one_is_used_and_no_other(maker: ThreadPoolExecutor) -> None:
    source = Source()
    ahead = Ahead(source, 2, maker)
    assert next(ahead) == 0
    assert source.made[3].wait(SECONDS), "the second block waited for somebody to ask for it"
    ahead.wait()
    assert len(source.makers) == 4
    assert [next(ahead), next(ahead)] == [1, 2]
    assert source.made[5].wait(SECONDS)
    ahead.wait()
    assert len(source.makers) == 6


def test_the_first_block_is_made_by_who_asks_for_it(maker: ThreadPoolExecutor) -> None:
    source = Source()
    next(Ahead(source, 2, maker))
    assert source.made[3].wait(SECONDS)
    here = threading.get_ident()
    assert [maker == here for maker in source.makers[:4]] == [True, True, False, False]


def test_a_failure_is_raised_where_its_item_is_asked_for(maker: ThreadPoolExecutor) -> None:
    ahead = Ahead(Source(fails_at=2), 2, maker)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.wait()
