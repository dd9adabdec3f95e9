"""The end of a log, as it is kept in the status for people."""

import json

import pytest

from lora_operator.evidence.logtext import tell_people


def progress(**fields: object) -> str:
    return json.dumps({"lora": {"at": "2026-11-23T18:00:00Z", **fields}})


STEP = {"event": "step", "totalSteps": 18, "loss": 1.23456}
LOGS = {
    "a traceback stays to the letter": (
        "Traceback:\n  File x\nValueError: broken\n",
        "Traceback:\n  File x\nValueError: broken\n",
    ),
    "a step is said in words": (progress(**STEP, step=4) + "\n", "[step 4 of 18, loss 1.235]\n"),
    "of many steps the last": (
        "\n".join(progress(**STEP, step=n) for n in range(9)) + "\n",
        "[step 8 of 18, loss 1.235]\n",
    ),
    "a stage, between lines": (
        f"a\n{progress(event='stage', stage='loading')}\nb",
        "a\n[loading]\nb",
    ),
    "an evaluation": (progress(event="eval", step=3, evalLoss=0.5), "[step 3, evaluation loss 0.5]"),
    "one of a later version with nothing that is known": (f"a\n{progress(event='gas')}\nb", "a\nb"),
    "advice that is no use here": ("Please make sure you already `pip install kernels` and\nx", "x"),
    "what only looks like progress": ('{"loss": 2}', '{"loss": 2}'),
    "progress that was cut": ('{"lora": {"at": "2026-11-23T1\nx', "x"),
    "progress that is not understood": ('{"lora": 1}\nx\n{"lora":{"step":"many"}}', "x"),
    "the result of a preflight, whose problems are its message already": (
        'a\n{"version": 1, "outcome": "failed", "at": "2026-11-23T18:00:00Z", "warnings": ["slow"], "problems": []}\n',
        "a\n[preflight failed]\nwarning: slow\n",
    ),
    "JSON of somebody else's": ('{"version": 1}', '{"version": 1}'),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("case", LOGS)
def test_a_log_is_told_to_people(case: str) -> None:
    log, want = LOGS[case]
    assert tell_people(log) == want
