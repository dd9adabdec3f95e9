"""The guide knows every failure class and every reason. ``UPDATE_GOLDEN=1`` writes its table anew."""

import os
from pathlib import Path

from lora_api import FAILURE_RULES, FailureRule
from lora_operator.lifecycle import decide
from tests.unit.operator.test_lifecycle import CASES, NOW, SETTINGS

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
    reasons = {mark.reason for case in CASES for mark in decide(case.observed, NOW, SETTINGS).conditions.values()}
    expected = {"PodsRunning", "PodsScheduled", "Succeeded", "Restarting"}
    assert [reason for reason in sorted(reasons - expected) if f"`{reason}`" not in text] == []
