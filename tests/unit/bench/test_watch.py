"""Measuring a program from outside."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.trainer import FULL, OURS, OURS_TWO, PACKED, PLAIN_TWO, missed_aims, other_jobs, our_run, plain_job, turns
from bench.watch import BenchError, Step, Watched, parse_step, watch
from lora_api.run import RunSpec, plan_batch

PROGRAM = """
import json, subprocess, sys
hold = "x = bytearray(150 * 2**20); x[::4096] = b'x' * len(x[::4096]); input()"
child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE)
for step in (1, 2, 3):
    sum(range(3_000_000))
    print("a line of something else")
    print(json.dumps({"step": step, "loss": 1.5, "tokens": step * 100}), flush=True)
import time
deadline = time.monotonic() + 20
peak = 0
while time.monotonic() < deadline and peak < 150 * 1024:
    status = open(f"/proc/{child.pid}/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0])
time.sleep(0.6)  # longer than the time between two samples
child.communicate(b"\\n")
"""


def test_a_program_is_measured_with_its_children(tmp_path: Path) -> None:
    done = watch([sys.executable, "-c", PROGRAM], {}, tmp_path / "log", 60)
    assert [(step.step, step.loss, step.tokens) for step in done.steps] == [(1, 1.5, 100), (2, 1.5, 200), (3, 1.5, 300)]
    assert done.trained_tokens == 200
    assert 0 < done.first_step_seconds == done.steps[0].at < done.steps[1].at < done.steps[2].at
    assert done.steps[0].cpu < done.steps[2].cpu
    assert 150 <= done.peak_mib < 300
    assert "a line of something else" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such model')", "exit code 1 after 0 steps.*no such model"),
        ("print('{}')", "exit code 0 after 0 steps"),
        ("while True: pass", "exit code -9"),
    ],
    ids=["it fails", "it reports no steps", "it does not end"],
)
def test_a_program_that_cannot_be_measured_is_an_error(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=f"(?s){message}"):
        watch([sys.executable, "-c", code], {}, tmp_path / "log", 2)


LINES = {
    "plain TRL": ('{"step": 2, "loss": 0.5, "tokens": 90}', {"step": 2, "loss": 0.5, "tokens": 90}),
    "this trainer": (
        '{"lora": {"event": "step", "step": 2, "loss": 0.5, "tokensPerSecond": 45.0}}',
        {"step": 2, "loss": 0.5, "rate": 45.0},
    ),
    "another event": ('{"lora": {"event": "stage", "stage": "loading"}}', None),
    "another object": ('{"step": 2}', None),
    "a list": ("[1]", None),
    "text": ("loss: 0.5", None),
}


@pytest.mark.parametrize("case", LINES)
def test_lines_of_either_program(case: str) -> None:
    line, want = LINES[case]
    assert parse_step(line) == want


def test_speed_leaves_out_the_first_step() -> None:
    done = Watched(
        [Step(1, 1.0, 20.0, 15.0, 500.0), Step(2, 1.0, 22.0, 16.0, 900.0), Step(3, 1.0, 24.0, 17.0, 1300.0)], 1
    )
    assert (done.first_step_seconds, done.tokens_per_second, done.tokens_per_cpu_second) == (20.0, 200.0, 400.0)


def test_both_sides_of_the_comparison_are_the_same_job(tmp_path: Path) -> None:
    ours = RunSpec.model_validate(our_run(FULL, OURS_TWO, tmp_path / "m", tmp_path, tmp_path))
    plain = plain_job(FULL, PLAIN_TWO, tmp_path / "m", tmp_path, tmp_path)
    plan = plan_batch(ours.training, ours.parallelism)
    assert plain["micro_batch"] == plan.micro_batch_size
    assert plain["accumulation"] == plan.gradient_accumulation_steps
    assert plan.world_size == 2
    assert (plain["steps"], plain["seed"]) == (ours.training.max_steps, ours.training.seed)
    assert (plain["rank"], plain["alpha"], plain["learning_rate"]) == (ours.lora.r, ours.lora.alpha, 0.002)
    assert plain["max_length"] == ours.dataset.max_seq_length
    assert RunSpec.model_validate(our_run(FULL, PACKED, tmp_path, tmp_path, tmp_path)).dataset.packing


def test_levers_take_turns_with_the_trainer_as_it_is() -> None:
    order = turns(replace(FULL, rounds=2), ["no-prefetch", "compile"])
    assert [side.speed for side in order] == ["", "no-prefetch", "compile"] * 2
    assert order[0] == OURS
    assert PLAIN_TWO in turns(FULL)


def a_side(name: str, speed: float, memory: float, first_step: float) -> dict[str, object]:
    ratios = {"tokensPerSecond": speed, "peakMiB": memory, "firstStepSeconds": first_step}
    return {"side": name, "ratioMinMedianMax": {measure: [0.0, ratio, 9.0] for measure, ratio in ratios.items()}}


@pytest.mark.parametrize(
    ("ours", "packed", "missed"),
    [
        pytest.param((1.0, 1.0, 1.0), (1.3, 2.0, 2.0), [], id="equal without packing, 1.3 times as fast with it"),
        pytest.param((0.9, 1.0, 1.0), (1.3, 1.0, 1.0), ["this trainer: tokensPerSecond is 0.90"], id="slower"),
        pytest.param((1.0, 1.1, 1.0), (1.3, 1.0, 1.0), ["this trainer: peakMiB is 1.10"], id="more memory"),
        pytest.param((1.0, 1.0, 1.2), (1.3, 1.0, 1.0), ["this trainer: firstStepSeconds is 1.20"], id="a later start"),
        pytest.param(
            (1.0, 1.0, 1.0), (1.2, 1.0, 1.0), ["this trainer, packing: tokensPerSec"], id="packing gains little"
        ),
    ],
)
def test_aims_that_are_missed_are_named(
    ours: tuple[float, float, float], packed: tuple[float, float, float], missed: list[str]
) -> None:
    lines = missed_aims({"sides": [a_side("this trainer", *ours), a_side("this trainer, packing", *packed)]})
    assert [line[: len(start)] for line, start in zip(lines, missed, strict=True)] == missed


@pytest.mark.parametrize(
    ("plain", "ours", "lines"),
    [
        pytest.param(1.449, 1.36, [], id="the same job"),
        pytest.param(
            0.045, 1.36,
            ["the loss falls by 1.36 in this trainer and by 0.045 in plain TRL: that is not the same job"],
            id="one learns next to nothing",
        ),
        pytest.param(
            0.067, 0.12,
            ["the loss falls by 0.12 in this trainer and by 0.067 in plain TRL: that is not the same job"],
            id="one learns half, of a loss that is nearly the same",
        ),
    ],
)  # fmt: skip
def test_sides_that_learn_something_else_are_named(plain: float, ours: float, lines: list[str]) -> None:
    learned = {"plain TRL": plain, "this trainer": ours, "this trainer, packing": 9.0, "plain TRL (DDP)": plain}
    assert other_jobs({"sides": [{"side": side, "learned": fall} for side, fall in learned.items()]}) == lines
