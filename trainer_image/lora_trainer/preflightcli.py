"""The surroundings of ``lora_trainer preflight``: its environment, its output, its last words and its exit code."""

import contextlib
import math
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from lora_api.failures import RULES, FailureClass
from lora_api.messages import Termination
from lora_api.preflight import MemoryEstimate, PreflightOutcome, PreflightResult, Problem, RunPlan
from lora_api.run import RUN_VERSION, WORK_DIRECTORY
from lora_trainer.errors import classify, describe

UNCLASSED = 70


def run_preflight(run_file: Path, device_gib: float | None) -> int:
    """Checks the run in ``run_file`` and says what was found. Returns the exit code of the failure table."""
    work = os.environ.get("LORA_WORK") or (WORK_DIRECTORY if Path(WORK_DIRECTORY).is_dir() else None)
    set_environment(work)
    try:
        if work is not None:
            Path(work).mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="preflight-", dir=work) as scratch,
            contextlib.redirect_stdout(sys.stderr),
        ):
            result = _check(run_file, Path(scratch), device_gib)
    except OSError as error:  # no place for files, or no space left in it
        result = _refuse(classify(error), describe(error))
    from lora_trainer.launch import say

    sys.stdout.write(result.model_dump_json(by_alias=True, exclude_none=True) + "\n")
    sys.stderr.write(to_text(result) + "\n")
    say(last_words(result))
    found = result.failure_class
    return 0 if found is None else RULES[found].exit_code or UNCLASSED


def _check(run_file: Path, scratch: Path, device_gib: float | None) -> PreflightResult:
    if device_gib is not None and (not math.isfinite(device_gib) or device_gib <= 0):
        message = f"--gpu-memory-gib is {device_gib:g}; give the memory of one GPU in GiB, such as 80"
        return _refuse(FailureClass.BAD_SPEC, message)
    try:
        document = run_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return _refuse(FailureClass.BAD_SPEC, f"{run_file}: is not UTF-8 text")
    except OSError as error:
        return _refuse(FailureClass.BAD_SPEC, f"{run_file}: {error.strerror or error}")
    from lora_trainer.preflight import preflight
    from lora_trainer.worker import quiet_libraries

    quiet_libraries()
    return preflight(document, run_file.name, scratch, device_gib)


def set_environment(work: str | None) -> None:
    """Gives the libraries of the hub a place to write in a pod, whose root cannot be written to.

    On a person's machine, where there is no scratch directory, they keep their own cache.
    """
    if work is not None:
        os.environ.setdefault("HF_HOME", str(Path(work) / "hf"))
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def last_words(result: PreflightResult) -> Termination:
    """The termination message."""
    found = result.failure_class
    if found is None:
        return Termination(outcome="succeeded", message=_summarize(result), at=result.at, preflight=settled_by(result))
    message = "\n".join(problem.message for problem in result.problems)
    return Termination(outcome="failed", failure_class=found, message=message, remedy=RULES[found].remedy, at=result.at)


def settled_by(result: PreflightResult) -> PreflightOutcome:
    """What the operator is to keep. A run that passed needs no suggestions, and there is room for 4096 bytes."""
    plan = None if result.plan is None else result.plan.model_copy(update={"suggestions": []})
    return PreflightOutcome(pins=result.pins, plan=plan, run_version=RUN_VERSION)


def _summarize(result: PreflightResult) -> str:
    """What passed, in a few sentences for a condition's message."""
    words = []
    if result.data is not None:
        words.append(f"{result.data.train_records:,} records, {result.data.tokens:,} tokens an epoch")
    plan = result.plan
    if plan is not None and plan.total_steps is not None:
        words.append(f"{plan.total_steps:,} steps")
    if plan is not None and plan.memory is not None:
        device = "" if plan.memory.device_gib is None else f" of {plan.memory.device_gib:g}"
        words.append(f"{plan.memory.safe_gib:.2f}{device} GiB for each process")
    if result.start is not None:
        words.append(result.start)
    return ". ".join(["; ".join(words) or "passed", *(f"Warning: {text}" for text in result.warnings)])


def _refuse(failure_class: FailureClass, message: str) -> PreflightResult:
    problem = Problem(failure_class=failure_class, message=message)
    return PreflightResult(outcome="failed", problems=[problem], at=datetime.now(UTC))


def to_text(result: PreflightResult) -> str:
    """The result for people."""
    lines = [f"preflight {result.outcome}"]
    for name, pin in (("model", result.pins.base_model), ("train", result.pins.train), ("eval", result.pins.eval)):
        if pin is not None:
            lines.append(
                f"{name}: {pin.uri} at {pin.revision or pin.digest}, {pin.files} files, {pin.size_bytes:,} bytes"
            )
    if result.model is not None:
        types = ", ".join(f"{count:,} {name}" for name, count in result.model.parameters_by_type.items())
        lines.append(f"weights: {result.model.model_type}, {result.model.parameters:,} parameters ({types})")
    if result.data is not None:
        lines.append(f"data: {result.data.to_text()}")
    if result.plan is not None:
        lines += _plan_lines(result.plan)
    lines += [] if result.start is None else [f"start: {result.start}"]
    lines += [f"warning: {text}" for text in result.warnings]
    lines += [f"{one.failure_class.value}: {one.message}" for one in result.problems]
    return "\n".join(lines)


def _plan_lines(plan: RunPlan) -> list[str]:
    micro = "settled when it starts" if plan.micro_batch_size is None else str(plan.micro_batch_size)
    lines = [
        f"plan: micro-batch {micro}, {plan.processes} processes, weights over {plan.shard_size}, "
        f"{plan.total_steps or 'an unknown number of'} steps"
    ]
    if plan.memory is not None:
        lines.append(f"memory of each process: {_memory_line(plan.memory)}")
    if plan.served_memory is not None:
        lines.append(f"memory of each process, on the base model as it is served: {_memory_line(plan.served_memory)}")
    return lines


def _memory_line(memory: MemoryEstimate) -> str:
    fits = {None: "", True: ", which fits", False: ", which does not fit"}[memory.fits]
    device = "" if memory.device_gib is None else f" of {memory.device_gib:g}"
    return f"{memory.estimate_gib:.2f} GiB, {memory.safe_gib:.2f}{device} to be safe{fits}"
