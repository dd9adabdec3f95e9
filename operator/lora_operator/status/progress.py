"""From the lines of rank 0's log to the progress that people see. All pure."""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime

from lora_api import Progress, ProgressLine, parse_progress_line
from lora_api.status import MAX_HISTORY
from lora_operator.wording import format_duration

MAX_STEPS = 2**31 - 1
"""More optimizer steps than any run has, and more seconds than anybody waits for."""


def parse_log(log: str) -> tuple[list[ProgressLine], str]:
    """The progress lines in ``log``, oldest first, and the last line that is none; empty without one.

    Only a line feed ends a line, as in the log itself. Each is parsed once: of many gangs this is most of the work.
    """
    lines, output = list[ProgressLine](), ""
    for text in log.split("\n"):
        line = parse_progress_line(text)
        if line is not None:
            lines.append(line)
        else:
            output = text.strip() or output
    return lines, output


def parse_progress(log: str) -> list[ProgressLine]:
    """The progress lines in ``log``, oldest first."""
    return parse_log(log)[0]


def keep_believable(lines: Sequence[ProgressLine], first: ProgressLine | None = None) -> list[ProgressLine]:
    """``lines`` without steps that cannot be: beyond the last one, or of another number of steps than the ``first``.

    ``first`` is the first step of the attempt that is known. The image may be anybody's, and what it says goes into a
    status that the API server has to take.
    """
    known, kept = first, list[ProgressLine]()
    for line in lines:
        if line.event == "step" and line.step is not None:
            total = line.total_steps
            if total is not None and not line.step <= total <= MAX_STEPS:
                continue
            if known is not None and total != known.total_steps:
                continue
            known = known or line
        kept.append(line)
    return kept


def compute_stage(lines: Sequence[ProgressLine], previous: str = "") -> str:
    """What the trainer does now: loading, training, evaluating, checkpointing, publishing or done."""
    for line in reversed(lines):
        if line.event == "step":
            return "training"
        if line.event == "stage" and line.stage:
            return line.stage
    return previous


def describe_last(lines: Sequence[ProgressLine]) -> str:
    """What tells the last of ``lines`` from any other; empty without lines."""
    return f"{lines[-1].at.isoformat()} {lines[-1].event} {lines[-1].stage} {lines[-1].step}" if lines else ""


def find_first_step(known: ProgressLine | None, lines: Sequence[ProgressLine]) -> ProgressLine | None:
    """The first step of an attempt that is known, once ``lines``, the end of its log, were read too."""
    return known or next(iter(_steps_of(lines)), None)


def _steps_of(lines: Sequence[ProgressLine]) -> list[ProgressLine]:
    """The steps in their order: one that is told again, or goes back, takes the place of those from it on."""
    steps: list[ProgressLine] = []
    for line in lines:
        if line.event == "step" and line.step is not None:
            while steps and (steps[-1].step or 0) >= line.step:
                steps.pop()
            steps.append(line)
    return steps


def compute_progress(
    previous: Progress | None,
    lines: Sequence[ProgressLine],
    *,
    logging_steps: int,
    first: ProgressLine | None = None,
    read_at: datetime | None = None,
) -> Progress:
    """``previous`` brought up to ``lines``, which are the end of one pod's log.

    ``first`` is the first step of the attempt that is known. The time that is left is estimated by the pace since then,
    with all evaluations and checkpoints: how many of these the last few steps had says little of how many are to come.
    ``read_at`` is when the log was read, which is when a step is told by our clock: that of the node may be hours off.
    """
    old = previous or Progress()
    steps = _steps_of(lines)
    losses = [line.eval_loss for line in lines if line.eval_loss is not None]
    if not steps:
        return old.model_copy(update={"eval_loss": shorten(losses[-1])}) if losses else old
    last = steps[-1]
    step, total = last.step or 0, last.total_steps or old.total_steps
    percent = min(100, 100 * step // total) if total else 0
    known = old.at is not None and (old.step, old.total_steps) == (step, total)
    eta = _estimate_seconds(first or steps[0], last, total)
    return old.model_copy(
        update={
            "step": step,
            "total_steps": total,
            "percent": percent,
            "summary": f"{percent}%",
            "epoch": shorten(last.epoch),
            "loss": shorten(last.loss),
            "eval_loss": shorten(losses[-1]) if losses else old.eval_loss,
            "learning_rate": shorten(last.learning_rate),
            "grad_norm": shorten(last.grad_norm),
            "tokens_per_second": last.tokens_per_second,
            "eta_seconds": eta,
            "eta": None if eta is None else format_duration(eta),
            "at": old.at if known else read_at or last.at,
            "history": merge_history(old.history, steps, logging_steps),
        }
    )


def compute_stopped_progress(progress: Progress | None, *, succeeded: bool) -> Progress | None:
    """The progress of an attempt that has ended: no time is left, and after success no step."""
    if progress is None:
        return None
    stopped: dict[str, object] = {"eta_seconds": None, "eta": None}
    if succeeded and progress.total_steps:
        stopped |= {"step": progress.total_steps, "percent": 100, "summary": "100%"}
    return progress.model_copy(update=stopped)


def merge_history(
    history: Iterable[Sequence[float]], steps: Sequence[ProgressLine], logging_steps: int
) -> list[list[float]]:
    """At most MAX_HISTORY points: what ``steps`` say from their first step on, and ``history`` before it.

    Only steps on a grid are kept, which gets twice as wide whenever it holds too many points, so that the points stay
    evenly spaced whichever tails of the log were read. The newest point is kept too.
    """
    losses = [(line.step, shorten(line.loss)) for line in steps]
    new = [[float(step), loss] for step, loss in losses if step is not None and loss is not None]
    if not new:
        return [list(point) for point in history]
    points = [list(point) for point in history if point[0] < new[0][0]] + new
    newest = points[-1]
    count = newest[0] / logging_steps
    stride = logging_steps * 2 ** max(0, math.ceil(math.log2(max(count, 1) / (MAX_HISTORY - 1))))
    kept = [point for point in points[:-1] if point[0] % stride == 0]
    return [*kept[-(MAX_HISTORY - 1) :], newest]


def _estimate_seconds(first: ProgressLine, last: ProgressLine, total: int) -> int | None:
    """Seconds until the last step, at the pace between two steps; ``None`` while there is no pace."""
    step = last.step or 0
    done = step - (first.step or 0)
    if total <= 0 or done <= 0:
        return 0 if total and step >= total else None
    seconds = (last.at - first.at).total_seconds() / done * (total - step)
    return round(min(max(0.0, seconds), MAX_STEPS))


def shorten(value: float | None) -> float | None:
    """``value`` with five digits, which is what a person reads in a table. The report has all of them."""
    return None if value is None else float(f"{value:.5g}")
