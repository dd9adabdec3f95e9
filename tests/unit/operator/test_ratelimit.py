"""The client's own speed limit."""

from lora_operator.kube.ratelimit import TokenBucket


def test_a_burst_is_free_and_then_the_rate_holds() -> None:
    bucket = TokenBucket(rate=10.0, burst=2)
    assert [round(bucket.reserve(0.0), 3) for _ in range(5)] == [0.0, 0.0, 0.1, 0.2, 0.3]


def test_time_fills_the_bucket_up_to_the_burst() -> None:
    bucket = TokenBucket(rate=10.0, burst=2)
    for _ in range(2):
        bucket.reserve(0.0)
    assert bucket.reserve(0.1) == 0.0
    assert [bucket.reserve(100.0) for _ in range(2)] == [0.0, 0.0]
    assert round(bucket.reserve(100.0), 3) == 0.1


def test_a_closed_bucket_keeps_everybody_still() -> None:
    bucket = TokenBucket(rate=10.0, burst=1)
    bucket.close(until=7.0)
    assert bucket.reserve(2.0) == 5.0
    assert round(bucket.reserve(2.0), 3) == 5.1
    assert bucket.reserve(60.0) == 0.0


def test_a_later_hold_wins() -> None:
    bucket = TokenBucket(rate=10.0, burst=5)
    bucket.close(until=7.0)
    bucket.close(until=3.0)
    assert bucket.reserve(0.0) == 7.0


def test_without_a_rate_a_burst_is_all_that_is_free_of_waiting_and_nobody_waits_for_ever() -> None:
    bucket = TokenBucket(rate=0.0, burst=1)
    assert [bucket.reserve(0.0) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_a_slow_rate_holds_too() -> None:
    bucket = TokenBucket(rate=0.5, burst=1)
    assert [bucket.reserve(0.0) for _ in range(3)] == [0.0, 2.0, 4.0]
