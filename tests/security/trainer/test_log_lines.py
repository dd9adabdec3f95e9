"""What a training process prints never passes for a progress line. Real launchers, with small programs to train."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_api.messages import ProgressLine, Termination, parse_progress_line, parse_termination
from lora_operator.status.progress import keep_believable, parse_progress
from lora_trainer.relay import MAX_LINE, Lines
from tests.trainer.runs import ROOT, SOURCES, build_run

FORGED = '{"lora":{"event":"step","at":"2026-11-23T18:00:00Z","step":17,"totalSteps":18,"loss":0.0001}}'

DRIVER = """
import re, sys
from pathlib import Path
import lora_trainer.launch
lora_trainer.launch.worker_command = lambda _: [sys.executable, sys.argv[2]]
code = lora_trainer.launch.launch(Path(sys.argv[1]))
Path(sys.argv[3]).write_text(re.search("VmHWM: *(.*) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""

PRELUDE = """
import os, signal, subprocess, sys, time
from datetime import UTC, datetime
from lora_trainer.progress import Progress
progress = Progress(enabled=True)
"""


@dataclass(frozen=True)
class Ended:
    """A launcher that has ended. ``log`` is what the kubelet keeps: standard output and standard error as one."""

    code: int
    log: bytes
    words: Termination
    peak_mib: float
    seconds: float

    @property
    def text(self) -> str:
        return self.log.decode(errors="replace")

    @property
    def steps(self) -> list[int | None]:
        """Steps that the operator would take from this log."""
        return [line.step for line in keep_believable(parse_progress(self.text))]


Start = Callable[[str], Ended]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs a launcher whose training process is the program."""
    run = build_run(tmp_path / "model", tmp_path / "data", tmp_path, {})
    (tmp_path / "run.json").write_text(json.dumps(run.to_wire()))
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, SOURCES)),
        "LORA_WORK": str(tmp_path / "work"),
        "LORA_TERMINATION_LOG": str(tmp_path / "words"),
    }

    def start(program: str) -> Ended:
        (tmp_path / "worker.py").write_text(PRELUDE + textwrap.dedent(program).replace("FORGED", repr(FORGED)))
        files = [tmp_path / name for name in ("run.json", "worker.py", "peak")]
        began = time.monotonic()
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, str(tmp_path / "driver.py"), *map(str, files)]
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, cwd=ROOT, timeout=60, check=False)
        words = parse_termination((tmp_path / "words").read_text())
        assert words is not None
        peak = int((tmp_path / "peak").read_text()) / 1024
        return Ended(done.returncode, (tmp_path / "log").read_bytes(), words, peak, time.monotonic() - began)

    return start


IMITATIONS = {
    "on standard output": "print(FORGED)",
    "on standard error": "print(FORGED, file=sys.stderr)",
    "inside of a record": "print('bad record: ' + FORGED)",
    "behind a line feed in a record": "print('bad record: x\\n' + FORGED)",
    "behind a carriage return": "print('x\\r' + FORGED)",
    "behind what Python takes for the end of a line": "print('x\\u2028' + FORGED + '\\x0b' + FORGED)",
    "behind a timestamp": "print('2026-11-23T18:00:00.123456789Z ' + FORGED)",
    "in pieces": """
        for character in FORGED + '\\n':
            os.write(1, character.encode())
            time.sleep(0.001)
        """,
    "with half of it on each stream": "os.write(1, FORGED[:9].encode()); os.write(2, (FORGED[9:] + '\\n').encode())",
    "without an end": "os.write(1, FORGED.encode())",
    "by another program": "subprocess.run(['echo', FORGED])",
    "at the end of a line too long": "print('x' * 70_000 + '\\n' + FORGED)",
    "in a stack trace": """
        try:
            raise ValueError('\\n' + FORGED)
        except ValueError:
            import traceback
            traceback.print_exc()
        """,
}


def test_nothing_that_is_printed_is_taken_for_progress(start: Start) -> None:
    """Attack: who writes the dataset puts a progress line where the trainer or a library prints it."""
    programs = [
        f"progress.report_step(step={number}, total_steps=18)\n{textwrap.dedent(program)}\nprint('did {case}')"
        for number, (case, program) in enumerate(IMITATIONS.items(), start=1)
    ]
    ended = start("\n".join(programs))
    assert ended.code == 0, ended.text
    for case in IMITATIONS:
        assert f"did {case}" in ended.text
    assert ended.steps == list(range(1, len(IMITATIONS) + 1))
    assert '"loss":0.0001' in ended.text, "people still read it"


@given(st.lists(st.sampled_from([FORGED, "\n", "\r", "x", FORGED[:5], FORGED[5:], "\u2028", " "]), max_size=12))
def test_however_it_is_cut_no_line_comes_through(parts: list[str]) -> None:
    """Attack: who writes the dataset has a progress line arrive in pieces."""
    lines = Lines(trusted=False)
    out = b"".join([*(lines.feed(part.encode()) for part in parts), lines.close()]).decode()
    assert parse_progress(out) == []
    assert b'{"lora"' not in out.encode(), "an operator of an older version looks anywhere in a line"


def test_an_operator_believes_no_line_that_merely_contains_one() -> None:
    """Attack: who writes the dataset has a trainer of an older version quote a progress line."""
    for quote in ("record 4: ", " ", "\t", "2026-11-23 ", "2026-11-23T18:00:00Z x", '"', "{"):
        assert parse_progress_line(quote + FORGED) is None
    assert parse_progress_line(FORGED) is not None


def test_what_was_printed_last_is_in_the_log(start: Start) -> None:
    """Attack: a process that is killed in the middle of a line takes its last words with it."""
    ended = start("""
        progress.report_step(step=2, total_steps=18)
        os.write(2, b"the reason why, without an end")
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    assert ended.code == 70
    assert ended.steps == [2]
    assert "the reason why, without an end\n" in ended.text


def test_a_line_of_100_mb_is_cut_and_said(start: Start) -> None:
    """Attack: who writes the dataset has a library print 100 MB in one line, for the operator to hold in memory."""
    ended = start("""
        for _ in range(1600):
            os.write(1, b"x" * 65536)
        os.write(1, b"END\\n")
        progress.report_step(step=3, total_steps=18)
        """)
    assert ended.code == 0
    assert ended.steps == [3]
    assert len(ended.log) < 2 * MAX_LINE
    assert f" ... and {1600 * 65536 + 3 - MAX_LINE} bytes more\n" in ended.text
    assert ended.peak_mib < 120, "the launcher holds no more of a line than it keeps"


def test_a_program_that_outlives_the_training_holds_nothing_up(start: Start) -> None:
    """Attack: a program that a library has started keeps the log's pipe open and writes into it for ever."""
    ended = start("""
        program = "import os, time\\nend = time.time() + 30\\nwhile time.time() < end: os.write(1, b'y')"
        subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        time.sleep(0.5)
        """)
    assert ended.code == 0
    assert ended.seconds < 15


def test_a_record_cannot_speak_the_last_words(start: Start) -> None:
    """Attack: who writes the dataset has an error quote last words that tell of success."""
    ended = start("""
        from pathlib import Path
        from lora_api.failures import FailureClass
        from lora_trainer.outcome import WorkerError, write_error
        text = 'record 1: "}' + '\\n{"version":1,"outcome":"succeeded","at":"2026-11-23T18:00:00Z"}\\n' + FORGED
        write_error(Path(os.environ["LORA_STATE_DIR"]), WorkerError(0, FailureClass.BAD_DATA, text, 1.0))
        sys.exit(65)
        """)
    assert ended.words.outcome == "failed"
    assert ended.words.message.startswith('record 1: "}')
    assert ended.steps == []


AT = datetime(2026, 11, 23, 18, tzinfo=UTC)


def step(number: int, total: int | None = 18) -> ProgressLine:
    return ProgressLine(event="step", at=AT, step=number, total_steps=total)


LIES: dict[str, tuple[list[ProgressLine], list[int]]] = {
    "a step beyond the last": ([step(1), step(19)], [1]),
    "another number of steps": ([step(1), step(2, total=20)], [1]),
    "another number of steps, from the first": ([step(2, total=40), step(3, total=40)], []),
    "more steps than there can be": ([step(2**40, total=2**41), step(1)], [1]),
    "no number of steps": ([step(1), step(2, total=None)], [1]),
}


@pytest.mark.parametrize("case", LIES)
def test_steps_that_cannot_be_are_left_out(case: str) -> None:
    """Attack: an image of somebody's own prints progress lines that cannot be true."""
    lines, want = LIES[case]
    known = step(1) if case.endswith("from the first") else None
    assert [line.step for line in keep_believable(lines, known)] == want
