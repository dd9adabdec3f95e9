"""The files of a checkpoint, once it was fetched: their names, and the state of the loop in them, which is JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from lora_trainer.evaluate import Evaluation

ADAPTER_STATE = "adapter.safetensors"
OPTIMIZER_STATE = "optimizer.safetensors"
TRAINER_STATE = "trainer_state.json"
LOOP_STATE = "loop.json"
SHARED = (ADAPTER_STATE, OPTIMIZER_STATE, TRAINER_STATE, LOOP_STATE)
"""Files that rank 0 writes and every rank reads."""

OBJECTIVE_STATE = "objective.safetensors"
"""What an objective needs again and can no longer compute. Only where there is any."""


def rng_file(rank: int) -> str:
    """Name of the file with the random states of ``rank``."""
    return f"rng-{rank}.json"


@dataclass(frozen=True)
class Resume:
    """A checkpoint that was fetched: its step, its files, the evaluation before training, and steps skipped so far."""

    step: int
    directory: Path
    before: Evaluation
    skipped: int = 0


def read_resume(step: int, directory: Path) -> Resume:
    """The checkpoint of ``step`` that was fetched to ``directory``."""
    loop = json.loads((directory / LOOP_STATE).read_text())
    return Resume(step, directory, Evaluation.from_wire(loop["before"]), loop["skipped"][0])


def place_schedule(schedule: Any, saved: Mapping[str, Any]) -> None:
    """Moves ``schedule`` to where the ``saved`` one was. The rates are those of its own learning rate and length."""
    fresh = schedule.state_dict()
    step = int(saved["last_epoch"])
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    moved = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    schedule.load_state_dict({**fresh, **moved})


def find_odd_state(directory: Path, step: int) -> str | None:
    """Why the JSON of a checkpoint of ``step`` is none that was saved with it: whoever wrote it is nobody to trust."""
    try:
        loop = json.loads((directory / LOOP_STATE).read_text())
        Evaluation.from_wire(loop["before"])
        _skipped, _in_a_row = map(int, loop["skipped"])
        int(loop["scheduler"]["last_epoch"])
        "".join([loop.get("resumedFrom") or ""])
        found = TrainerState.load_from_json(str(directory / TRAINER_STATE)).global_step
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        return f"{LOOP_STATE} or {TRAINER_STATE} is none that was saved: {repr(error)[:200]}"
    if found != step:
        return f"{TRAINER_STATE}: is of step {str(found)[:200]}"
    return None


def take_logging_steps(directory: Path, steps: int) -> None:
    """Lets the loop report every ``steps`` steps that goes on from the files in ``directory``, which are another run's.

    transformers takes the number from the state that it loads (5.23).
    """
    file = directory / TRAINER_STATE
    file.write_text(json.dumps({**json.loads(file.read_text()), "logging_steps": steps}))
