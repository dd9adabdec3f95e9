"""The operator under a profiler: ``python -m bench.scale.sampled DIRECTORY FLAGS...``.

Every few milliseconds of processor time a signal writes down what is being run. This costs little and sees C code as
its caller, where a tracing profiler would charge every small Python function for being traced. SIGUSR1 ends a part:
the samples so far go to a file of their own, 0.json, 1.json and so on.
"""

import itertools
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

INTERVAL = 0.004
"""Seconds of processor time between two samples."""

Stack = tuple[str, ...]
"""Innermost first, each as FILE:FUNCTION."""

_DEPTH = 60


def take(frame: FrameType | None) -> tuple[CodeType, ...]:
    """The stack at ``frame``. Code is kept, not its name: it is there anyway, and memory is measured too."""
    stack: list[CodeType] = []
    while frame is not None and len(stack) < _DEPTH:
        stack.append(frame.f_code)
        frame = frame.f_back
    return tuple(stack)


def name(code: CodeType) -> str:
    """How a frame is written down."""
    return f"{code.co_filename}:{code.co_name}"


def main() -> None:
    """Runs the operator, and writes the samples."""
    directory = Path(sys.argv.pop(1))
    directory.mkdir()
    numbers = itertools.count()
    samples: Counter[tuple[CodeType, ...]] = Counter()

    def end_part(*_: object) -> None:
        part = dict(samples)  # at one stroke: the other signal comes in between whatever takes longer
        samples.clear()
        text = json.dumps([[count, *map(name, stack)] for stack, count in part.items()])
        partial = directory / "partial"
        partial.write_text(text)
        partial.rename(directory / f"{next(numbers)}.json")

    signal.signal(signal.SIGUSR1, end_part)
    signal.signal(signal.SIGPROF, lambda _, frame: samples.update([take(frame)]))
    signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
    from lora_operator.main import main as run_operator

    run_operator()


if __name__ == "__main__":
    main()
