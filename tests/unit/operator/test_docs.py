"""The guide knows every failure class and every reason. ``UPDATE_GOLDEN=1`` writes its table anew."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from lora_api import FAILURE_RULES, ConditionType, FailureRule
from lora_operator.lifecycle.decide import decide
from lora_operator.settings import Settings
from tests.unit.operator import test_lifecycle, test_preflight
from tests.unit.operator.builders import NOW
from tests.unit.operator.cases import Case

GUIDE = Path(__file__).parents[3] / "docs" / "troubleshooting.md"
RUNBOOK = GUIDE.with_name("operations.md")
BEGIN = "<!-- failures: written by UPDATE_GOLDEN=1 pytest tests/unit/operator/test_docs.py -->\n"
END = "<!-- end of failures -->"


def row(rule: FailureRule) -> str:
    code = "" if rule.exit_code is None else f"{rule.exit_code}"
    return f"| `{rule.failure_class}` | {rule.meaning} | {rule.remedy} | {rule.follows} | {code} |\n"


def test_the_table_of_failures_is_the_table_of_the_code() -> None:
    text = GUIDE.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    table = "| class | what happened | what to do | then | exit code |\n| --- | --- | --- | --- | --- |\n"
    want = head + BEGIN + table + "".join(row(rule) for rule in FAILURE_RULES) + END + tail
    if os.environ.get("UPDATE_GOLDEN"):
        GUIDE.write_text(want)
    assert GUIDE.read_text() == want


def test_every_reason_that_a_condition_can_have_is_explained() -> None:
    text = GUIDE.read_text()
    reasons = _reasons(test_lifecycle.CASES, test_lifecycle.SETTINGS)
    reasons |= _reasons(test_preflight.CASES, test_preflight.SETTINGS)
    expected = {"PodsRunning", "PodsScheduled", "Succeeded", "Restarting", "PreflightPassed", "TimeToLiveOver"}
    assert [reason for reason in sorted(reasons - expected) if f"`{reason}`" not in text] == []


def test_the_runbook_has_every_condition_and_every_failure() -> None:
    """The first line of an entry is that of the table; ``UPDATE_GOLDEN=1`` writes it. What follows is for people."""
    text = RUNBOOK.read_text()
    conditions, failures = text.split("## Runbook: conditions\n")[1].split("## Runbook: failures\n")
    rows = re.findall(r"^\| `(\w+)` \|", conditions, re.MULTILINE)
    assert rows == [str(kind) for kind in ConditionType]
    head, *entries = failures.split("### `")
    found = {entry.split("`")[0]: entry.split("\n", 2)[2].lstrip("\n") for entry in entries}
    assert list(found) == [str(rule.failure_class) for rule in FAILURE_RULES]
    written = "".join(
        f"### `{rule.failure_class}`\n\n{first_line(rule)}\n\n" + _people(found, rule) for rule in FAILURE_RULES
    )
    want = text.replace(failures, head + written.rstrip("\n") + "\n")
    if os.environ.get("UPDATE_GOLDEN"):
        RUNBOOK.write_text(want)
    assert RUNBOOK.read_text() == want


def first_line(rule: FailureRule) -> str:
    return f"*{rule.meaning} Then: {rule.follows}.*"


def _people(found: dict[str, str], rule: FailureRule) -> str:
    """The part of an entry that is written by hand."""
    text = found[str(rule.failure_class)]
    first, _, rest = text.partition("\n")
    hand = (rest if first.startswith("*") else text).strip("\n")
    assert hand, f"{rule.failure_class}: what to look at is missing"
    return hand + "\n\n"


def _reasons(cases: Iterable[Case], settings: Settings) -> set[str]:
    return {mark.reason for case in cases for mark in decide(case.observed, NOW, settings).conditions.values()}
