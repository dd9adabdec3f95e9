"""The order of the work queue: when keys are due, and which comes first. Time is given to it."""

import pytest

from lora_operator.workqueue import MAX_DELAY, PATIENCE, Schedule


def make_schedule(jitter: float = 0.0) -> Schedule[str]:
    return Schedule(jitter=lambda: jitter)


def test_wake_ups_coalesce_to_the_earliest() -> None:
    schedule = make_schedule()
    for at in (5.0, 3.0, 9.0):
        schedule.wake("a", at)
    assert (len(schedule), schedule.next_due()) == (1, 3.0)
    assert schedule.take(2.9) is None
    assert schedule.take(3.0) == "a"
    schedule.done("a", 3.0)
    assert schedule.next_due() is None


def test_keys_come_in_the_order_in_which_they_are_due() -> None:
    schedule = make_schedule()
    for key, at in (("late", 2.0), ("first", 1.0), ("second", 1.0)):
        schedule.wake(key, at)
    assert [schedule.take(3.0) for _ in range(4)] == ["first", "second", "late", None]


@pytest.mark.parametrize(
    ("wakes", "order"),
    [
        ([("log read", 0.0, 5.0), ("new run", 4.0, 0.0)], ["new run", "log read"]),
        ([("log read", 0.0, 5.0), ("new run", 6.0, 0.0)], ["log read", "new run"]),
        ([("far", 99.0, 0.0), ("log read", 0.0, 5.0)], ["log read", None]),
        ([("a", 0.0, 5.0), ("b", 1.0, 0.0), ("a", 0.5, 0.0)], ["a", "b"]),
        ([("a", 0.0, 0.0), ("b", 1.0, 0.0), ("a", 2.0, 9.0)], ["a", "b"]),
        ([("a", 8.0, 0.0), ("a", 1.0, 9.0), ("b", 7.0, 0.5)], ["b", "a"]),
    ],
    ids=[
        "a change first",
        "nothing for ever",
        "not due",
        "a change after all",
        "no turn is lost",
        "the better of both",
    ],
)
def test_of_the_keys_that_are_due_the_earliest_deadline_comes_first(
    wakes: list[tuple[str, float, float]], order: list[str | None]
) -> None:
    schedule = make_schedule()
    for key, at, patience in wakes:
        schedule.wake(key, at, patience)
    assert [schedule.take(7.5) for _ in order] == order
    assert schedule.take(7.5) is None


def test_a_key_that_was_ready_goes_first_once_something_changes() -> None:
    schedule = make_schedule()
    for key in ("first", "patient", "other"):
        schedule.wake(key, 0.0, 0.0 if key == "first" else 5.0)
    assert schedule.take(1.0) == "first"  # all were due
    schedule.wake("other", 1.0)
    assert [schedule.take(1.0) for _ in range(3)] == ["other", "patient", None]
    assert schedule.next_due() is None


@pytest.mark.parametrize(
    ("after", "order"),
    [(0.0, ["again", "change"]), (3.0, ["change", "again"]), (60.0, ["change", "again"])],
    ids=["at once is as good as a change", "as patient as it has waited", "but not for ever"],
)
def test_a_look_that_only_time_calls_for_lets_changes_go_first(after: float, order: list[str]) -> None:
    schedule = make_schedule()
    schedule.wake("again", 0.0)
    schedule.take(0.0)
    schedule.done("again", 0.0, again_after=after)
    schedule.wake("change", after + min(after, PATIENCE) - 0.1 if after else 0.1)
    assert [schedule.take(100.0) for _ in order] == order


def test_a_key_that_failed_lets_changes_go_first() -> None:
    schedule = make_schedule()
    schedule.wake("failed", 0.0)
    schedule.take(0.0)
    assert schedule.failed("failed", 0.0) == 0.5
    schedule.wake("change", 0.9)
    assert [schedule.take(1.0) for _ in range(2)] == ["change", "failed"]


def test_a_key_is_never_taken_twice_and_comes_again_when_woken_meanwhile() -> None:
    schedule = make_schedule()
    schedule.wake("a", 0.0)
    assert schedule.take(0.0) == "a"
    schedule.wake("a", 1.0)
    assert schedule.take(9.0) is None
    schedule.done("a", 9.0, again_after=5.0)
    assert schedule.next_due() == 1.0, "the wake-up is earlier than what was asked for"


def test_again_after() -> None:
    schedule = make_schedule()
    schedule.wake("a", 0.0)
    schedule.take(0.0)
    schedule.done("a", 10.0, again_after=5.0)
    assert schedule.next_due() == 15.0


def test_errors_back_off_twice_as_long_each_time_up_to_a_limit() -> None:
    schedule, delays, now = make_schedule(), [], 0.0
    schedule.wake("a", now)
    for _ in range(12):
        assert schedule.take(now) == "a"
        delays.append(schedule.failed("a", now))
        now += delays[-1]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == MAX_DELAY


def test_success_forgives_earlier_errors() -> None:
    schedule = make_schedule()
    for _ in range(3):
        schedule.wake("a", 0.0)
        schedule.take(1e9)
        schedule.failed("a", 0.0)
    schedule.take(1e9)
    schedule.done("a", 0.0)
    schedule.wake("a", 0.0)
    schedule.take(0.0)
    assert schedule.failed("a", 0.0) == 0.5


def test_jitter_takes_up_to_half_of_the_delay_away() -> None:
    schedule = make_schedule(jitter=1.0)
    schedule.wake("a", 0.0)
    schedule.take(0.0)
    assert schedule.failed("a", 0.0) == 0.25


def test_wake_ups_from_before_an_error_wait_with_it_and_later_ones_do_not() -> None:
    schedule = make_schedule()
    schedule.wake("a", 0.0)
    schedule.take(0.0)
    schedule.wake("a", 0.0)
    schedule.failed("a", 0.0)
    assert schedule.next_due() == 0.5
    schedule.wake("a", 0.1)
    assert schedule.next_due() == 0.1
