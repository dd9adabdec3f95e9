"""Versions of the run document: what a trainer of an earlier release is given, so that a run keeps its image.

A trainer that reads version 1 refuses fields that it does not know; from version 2 on it leaves them out and says so.
What nobody may go without is given to it all the same, so that it refuses the run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_api.run import RUN_VERSION, RunSpec

_FIELDS_OF_1 = """
. version namespace name uid attempt baseModel dataset lora quantization training parallelism checkpoint publish
. tracking device pins
baseModel uri revision
dataset train eval evalFraction format columns chatTemplate systemPrompt maxSeqLength packing assistantOnlyLoss
dataset.train uri revision split
dataset.eval uri revision split
lora r alpha dropout targetModules useRslora rankPattern alphaPattern newTokens
quantization type doubleQuant computeDtype
training objective dpo epochs maxSteps learningRate globalBatchSize microBatchSize optimizer scheduler warmupRatio
training weightDecay maxGradNorm gradientCheckpointing seed evalEverySteps loggingSteps
training.dpo beta loss labelSmoothing
parallelism nodes gpusPerNode strategy shardSize cpuOffload collectiveTimeoutSeconds
checkpoint everySteps everyMinutes keep
publish store name samplePrompts gate mergeBase
publish.gate minEvalLossImprovement maxEvalLoss
tracking wandb mlflow tensorboard
tracking.wandb project entity baseUrl
tracking.mlflow trackingUri experiment
device name memoryGiB
pins baseModel train eval
pins.baseModel uri revision digest files sizeBytes
pins.train uri revision digest files sizeBytes
pins.eval uri revision digest files sizeBytes
"""
"""Path of each object of version 1, and its fields. Objects that are not listed hold keys of the user's."""


def _read_table(table: str) -> dict[str, frozenset[str]]:
    fields: dict[str, frozenset[str]] = {}
    for line in table.split("\n"):
        path, *names = line.split() or [""]
        path = path.strip(".")
        fields[path] = fields.get(path, frozenset()) | frozenset(names)
    return fields


FIELDS_OF_1 = _read_table(_FIELDS_OF_1)


@dataclass(frozen=True)
class RunDocument:
    """A run document as JSON values, and the paths of what the run asks for and its trainer does not know."""

    document: dict[str, Any]
    left_out: tuple[str, ...] = ()


def to_version(run: RunSpec, version: int) -> RunDocument:
    """``run`` for a trainer that reads documents up to ``version``.

    The document bears the oldest version that knows all of its fields, so that as many trainers as possible take it.
    """
    whole = {**run.to_wire(), "version": RUN_VERSION}
    newer = tuple(path for path in _newer_than_1(whole, "") if path != _KEY)
    left_out = tuple(path for path in newer if path not in INDISPENSABLE)
    if version >= RUN_VERSION:
        return RunDocument({**whole, "version": RUN_VERSION if newer or _KEY in whole else 1})
    return RunDocument({**_only_of_1(whole, ""), "version": 1}, left_out)


INDISPENSABLE = frozenset({"checkpoint.resumeFrom"})
"""What a run without it would be another run."""

_KEY = "controlKey"
"""Of the operator's own making: nobody asked for it, and a trainer that does not know it does without."""


def _newer_than_1(node: Mapping[str, Any], at: str) -> Iterator[str]:
    known = FIELDS_OF_1.get(at)
    for name, value in node.items():
        path = f"{at}.{name}".lstrip(".")
        if known is not None and name not in known:
            yield path
        elif isinstance(value, Mapping):
            yield from _newer_than_1(value, path)


def _only_of_1(node: Mapping[str, Any], at: str) -> dict[str, Any]:
    known = FIELDS_OF_1.get(at)
    kept = {f"{at}.{name}".lstrip("."): (name, value) for name, value in node.items()}
    return {
        name: _only_of_1(value, path) if isinstance(value, Mapping) else value
        for path, (name, value) in kept.items()
        if known is None or name in known or path in INDISPENSABLE
    }
