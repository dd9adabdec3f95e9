"""From log lines to progress."""

import itertools
from datetime import timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_api import Progress, ProgressLine, parse_progress_line
from lora_operator.state.reports import Reports, hear
from lora_operator.status import progress
from lora_operator.status.progress import (
    compute_progress,
    compute_stage,
    compute_stopped_progress,
    find_first_step,
    merge_history,
    parse_log,
    parse_progress,
    shorten,
)
from lora_operator.wording import format_duration
from tests.unit.operator.builders import NOW, ago


def step(number: int, *, total: int = 100, seconds: float = 2.0, loss: float | None = 1.0) -> ProgressLine:
    at = NOW + timedelta(seconds=seconds * number)
    return ProgressLine(event="step", at=at, step=number, total_steps=total, loss=loss)


def steps(first: int, last: int, total: int = 100) -> list[ProgressLine]:
    return [step(number, total=total) for number in range(first, last + 1)]


HEARD: dict[str, tuple[str | None, Reports]] = {
    "a word that is new": ("b", Reports(last_word="b", heard_at=NOW)),
    "the same word again": ("a", Reports(last_word="a", heard_at=ago(60))),
    "no word yet": ("", Reports(last_word="a", heard_at=ago(60))),
    "a log that cannot be read": (None, Reports(last_word="a", heard_at=NOW)),
}


@pytest.mark.parametrize("case", HEARD)
def test_a_gang_was_heard_when_it_said_something_new(case: str) -> None:
    word, want = HEARD[case]
    assert hear(Reports(last_word="a", heard_at=ago(60)), word, NOW) == want


def test_only_whole_progress_lines_are_read() -> None:
    line = step(3).to_line()
    log = f"hello\n{line[20:]}\n2026-11-23T12:00:00Z {line}\n{line[:30]}"
    assert [found.step for found in parse_progress(log)] == [3]


@pytest.mark.parametrize(
    ("log", "found", "output"),
    [
        ("", [], ""),
        ("\n \n", [], ""),
        (f"{step(1).to_line()}\n{step(2).to_line()}\n", [1, 2], ""),
        (f"loading\n{step(1).to_line()}\n  a warning \r\n{step(2).to_line()}\n", [1, 2], "a warning"),
        (f"{step(1).to_line()}\ncut: {step(2).to_line()[:20]}", [1], f"cut: {step(2).to_line()[:20]}"),
    ],
)
def test_a_log_is_progress_and_other_output(log: str, found: list[int], output: str) -> None:
    lines, last = parse_log(log)
    assert ([line.step for line in lines], last) == (found, output)


def test_each_line_of_a_log_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def parse(text: str) -> ProgressLine | None:
        parsed.append(text)
        return parse_progress_line(text)

    monkeypatch.setattr(progress, "parse_progress_line", parse)
    texts = [line.to_line() for line in steps(1, 5)]
    lines, output = parse_log("\n".join(texts))
    assert (parsed, len(lines), output) == (texts, 5, "")


@pytest.mark.parametrize(
    ("lines", "want"),
    [
        ([], "loading"),
        ([ProgressLine(event="stage", at=NOW, stage="evaluating")], "evaluating"),
        ([ProgressLine(event="stage", at=NOW, stage="evaluating"), step(1)], "training"),
        ([step(1), ProgressLine(event="stage", at=NOW, stage="publishing")], "publishing"),
        ([ProgressLine(event="stage", at=NOW, stage="evaluating"), ProgressLine(event="eval", at=NOW)], "evaluating"),
    ],
)
def test_stage(lines: list[ProgressLine], want: str) -> None:
    assert compute_stage(lines, "loading") == want


def test_the_estimate_is_the_pace_of_the_steps() -> None:
    progress = compute_progress(None, steps(1, 20), logging_steps=1)
    assert (progress.step, progress.total_steps, progress.percent, progress.summary) == (20, 100, 20, "20%")
    assert (progress.eta_seconds, progress.eta) == (160, "2m40s")


@given(
    seed=st.integers(0, 2**16),
    total=st.integers(100, 1000),
    evaluations=st.one_of(st.just(0), st.integers(10, 40)),
    share=st.floats(0.0, 0.4),
    jitter=st.floats(0.0, 0.1),
)
def test_after_a_fifth_of_the_steps_the_estimate_is_right_within_a_tenth(
    seed: int, total: int, evaluations: int, share: float, jitter: float
) -> None:
    """A tenth of the time of the run, and one evaluation, which takes ``share`` times as long as the steps between two.

    The log is read at random moments, its last 200 lines each time.
    """
    random = Random(seed)
    every = total // evaluations if evaluations else total + 1
    lines, clock = [], 0.0
    for number in range(1, total + 1):
        clock += 2.0 * (1 + random.uniform(-jitter, jitter))
        lines.append(
            (clock, ProgressLine(event="step", at=NOW + timedelta(seconds=clock), step=number, total_steps=total))
        )
        clock += 2.0 * share * every * (number % every == 0)
    first, reads = None, sorted({1, *random.sample(range(1, total + 1), 10)})
    for number in reads:
        tail = [line for _, line in lines[max(0, number - 200) : number]]
        first = find_first_step(first, tail)
        found = compute_progress(None, tail, logging_steps=1, first=first)
        if number >= total / 5:
            left = lines[-1][0] - lines[number - 1][0]
            assert found.eta_seconds == pytest.approx(left, abs=0.1 * lines[-1][0] + 2.0 * share * every + 2)


def test_one_step_alone_has_no_pace() -> None:
    assert compute_progress(None, [step(1)], logging_steps=1).eta is None


def test_the_last_step_leaves_no_time() -> None:
    progress = compute_progress(None, steps(1, 100), logging_steps=1)
    assert (progress.percent, progress.eta_seconds, progress.eta) == (100, 0, "0s")


def test_an_evaluation_before_the_first_step_is_shown() -> None:
    line = ProgressLine(event="eval", at=NOW, eval_loss=3.0)
    assert compute_progress(None, [line], logging_steps=1).eval_loss == 3.0
    progress = compute_progress(Progress(eval_loss=3.0), [step(1)], logging_steps=1)
    assert (progress.eval_loss, progress.step) == (3.0, 1)


def test_no_news_is_no_change() -> None:
    progress = compute_progress(None, steps(1, 5), logging_steps=1)
    assert compute_progress(progress, [], logging_steps=1) == progress


def test_a_restart_from_a_checkpoint_replaces_the_points_after_it() -> None:
    before = compute_progress(None, steps(1, 30), logging_steps=1)
    after = compute_progress(before, [step(21, loss=9.0), step(22, loss=9.0)], logging_steps=1)
    assert [point[0] for point in after.history] == [float(number) for number in range(1, 23)]
    assert after.history[-2:] == [[21.0, 9.0], [22.0, 9.0]]


@given(st.integers(1, 5000), st.integers(1, 300), st.sampled_from([1, 5, 10]))
def test_history_is_short_even_and_ends_with_the_newest_whatever_tails_were_read(
    last: int, tail: int, logging_steps: int
) -> None:
    numbers = list(range(logging_steps, last * logging_steps + 1, logging_steps))
    history: list[list[float]] = []
    for begin in range(0, len(numbers), tail):
        lines = [step(number) for number in numbers[max(0, begin - 3) : begin + tail]]
        history = merge_history(history, lines, logging_steps)
        assert len(history) <= 100
    found = [point[0] for point in history]
    assert found[-1] == numbers[-1]
    assert found == sorted(set(found))
    gaps = {later - earlier for earlier, later in itertools.pairwise(found[:-1])}
    assert len(gaps) <= 1, "evenly spaced, the newest aside"
    assert len(found) >= min(len(numbers), 50), "and not thinned more than needed"


def test_a_short_history_keeps_every_point() -> None:
    assert [point[0] for point in merge_history([], steps(1, 99), 1)] == list(range(1, 100))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (80, "1m20s"), (7500, "2h05m"), (273_600, "3d04h")]
)
def test_format_duration(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_run_that_has_ended_has_no_time_left() -> None:
    progress = compute_progress(None, steps(1, 20), logging_steps=1)
    failed = compute_stopped_progress(progress, succeeded=False)
    assert failed is not None
    assert (failed.step, failed.summary, failed.eta) == (20, "20%", None)
    done = compute_stopped_progress(progress, succeeded=True)
    assert done is not None
    assert (done.step, done.summary, done.eta_seconds) == (100, "100%", None)
    assert compute_stopped_progress(None, succeeded=True) is None


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (None, None),
        (2.409038543701172, 2.409),
        (0.026757510378956795, 0.026758),
        (0.0002, 0.0002),
        (12345.678, 12346.0),
    ],
)
def test_numbers_have_as_many_digits_as_a_person_reads(value: float | None, want: float | None) -> None:
    assert shorten(value) == want


@pytest.mark.parametrize("hours", [-2, 0, 2])
def test_a_step_was_told_when_it_was_read_whatever_the_clock_of_its_node_says(hours: int) -> None:
    line = ProgressLine(event="step", at=NOW + timedelta(hours=hours), step=3, total_steps=100)
    first = compute_progress(None, [line], logging_steps=1, read_at=NOW)
    assert first.at == NOW
    later = NOW + timedelta(seconds=10)
    assert compute_progress(first, [line], logging_steps=1, read_at=later).at == NOW, "it is no news"
    assert compute_progress(first, [line, step(4)], logging_steps=1, read_at=later).at == later
