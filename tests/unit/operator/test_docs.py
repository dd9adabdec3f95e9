"""The guide knows every failure class and every reason. ``UPDATE_GOLDEN=1`` writes its table anew."""

import os
from collections.abc import Iterable
from pathlib import Path

from lora_api import FAILURE_RULES, FailureRule
from lora_operator.lifecycle import decide
from lora_operator.settings import Settings
from tests.unit.operator import test_lifecycle, test_preflight
from tests.unit.operator.builders import NOW

GUIDE = Path(__file__).parents[3] / "docs" / "troubleshooting.md"
BEGIN = "<!-- failures: written by UPDATE_GOLDEN=1 pytest tests/unit/operator/test_docs.py -->\n"
END = "<!-- end of failures -->"


def row(rule: FailureRule) -> str:
    follows = "ends the run" if not rule.retried else "restarts, counts" if rule.charged else "restarts"
    code = "" if rule.exit_code is None else f"{rule.exit_code}"
    return f"| `{rule.failure_class}` | {rule.meaning} | {rule.remedy} | {follows} | {code} |\n"


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
    expected = {"PodsRunning", "PodsScheduled", "Succeeded", "Restarting", "PreflightPassed"}
    assert [reason for reason in sorted(reasons - expected) if f"`{reason}`" not in text] == []


def _reasons(cases: Iterable[test_lifecycle.Case | test_preflight.Case], settings: Settings) -> set[str]:
    return {mark.reason for case in cases for mark in decide(case.observed, NOW, settings).conditions.values()}
