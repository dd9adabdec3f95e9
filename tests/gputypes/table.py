"""The cases of the lane: which runs are trained with a GPU's types, and what each of them is held to. Pure."""

from dataclasses import dataclass
from typing import Any

from tests.support.families import FAMILIES

PARALLELISM: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp": (2, {"strategy": "fsdp"}),
    "hsdp": (4, {"strategy": "hsdp", "shardSize": 2}),
    "cpuOffload": (2, {"strategy": "fsdp", "cpuOffload": True}),
}
"""Strategy: its processes, and ``parallelism``."""

OBJECTIVES = ("sft", "packing", "dpo", "newTokens")
QUANTIZATIONS = ("nf4", "int8", "none")
NEW_TOKENS = ("<|ticket|>", "<|end-of-ticket|>")
FAMILY = "llama-3"
"""Of the cases that are not about families."""


@dataclass(frozen=True)
class Row:
    """One run. ``resumed``: it is stopped, and goes on in a second attempt."""

    strategy: str
    objective: str = "sft"
    quantization: str = "nf4"
    family: str = FAMILY
    resumed: bool = False

    @property
    def name(self) -> str:
        """Of its files and in the tests' names."""
        parts = [self.strategy, self.objective, self.quantization, self.family]
        return "-".join([*parts, *(["resumed"] if self.resumed else [])])

    @property
    def processes(self) -> int:
        """How many train it."""
        return PARALLELISM[self.strategy][0]

    @property
    def alone(self) -> "Row":
        """The same run on one process, without a break: what this one is compared with."""
        return Row("alone", self.objective, self.quantization, self.family)

    def changes(self) -> dict[str, Any]:
        """What it changes in the run document of the tests. Everything else is as users have it by default.

        Families have fewer micro-batches: there are many of them.
        """
        batch, steps = (16, 3) if self.family == FAMILY else (4, 2)
        changes: dict[str, Any] = {
            "quantization": {"type": self.quantization},
            "parallelism": {"nodes": self.processes, "collectiveTimeoutSeconds": 60} | PARALLELISM[self.strategy][1],
            "training": {"maxSteps": steps, "globalBatchSize": batch, "microBatchSize": 2, "evalEverySteps": 2},
            "checkpoint": {"everySteps": 2},
            "dataset": {"eval": None},
        }
        if self.objective == "packing":
            changes["dataset"] |= {"packing": True}
        if self.objective == "dpo":
            changes["training"] |= {"objective": "dpo"}
        if self.objective == "newTokens":
            changes["lora"] = {"newTokens": list(NEW_TOKENS)}
        return changes


def build_rows() -> list[Row]:
    """Every strategy with every objective and every quantization, resumed, and every family alone and sharded."""
    rows = [
        Row(strategy, objective, quantization)
        for strategy in PARALLELISM
        for objective, quantization in (
            ("sft", "nf4"),
            ("packing", "none"),
            ("dpo", "nf4"),
            ("newTokens", "nf4"),
            ("sft", "int8"),
        )
    ]
    rows += [Row(strategy, resumed=True) for strategy in PARALLELISM]
    rows += [Row(strategy, family=family) for family in FAMILIES for strategy in ("alone", "fsdp") if family != FAMILY]
    return rows


ROWS = {row.name: row for row in build_rows()}
