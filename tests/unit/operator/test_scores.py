"""What the end of a run says of how good its adapter is."""

import json
from typing import Any

import pytest

from lora_api import AdapterStatus, ConditionType
from lora_operator.lifecycle.outcomes import decide_success, describe_scores
from tests.skew.releases import RECORDED

ADAPTER: dict[str, Any] = {
    "uri": "s3://m/a", "digest": f"sha256:{'0' * 64}", "version": 1, "servedName": "a-v1", "rank": 8,
    "servingMaxLoraRank": 8, "sizeBytes": 10, "evalLossBefore": 3.0, "evalLossAfter": 0.01, "evalShareAfter": 0.95,
}  # fmt: skip
SERVED: dict[str, Any] = {
    "dtype": "bfloat16", "records": 64, "allRecords": 64, "before": {"loss": 3.1, "share": 0.0},
    "after": {"loss": 0.031, "share": 0.78125}, "training": {"loss": 0.0109, "share": 0.953125},
}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "both bases, that which is served first": (
        SERVED,
        ". On the base model as it is served (bfloat16, 64 records): loss 0.0310, 78.1% right; on the one that was "
        "trained on: loss 0.0109, 95.3% right",
    ),
    "some of the records": (
        SERVED | {"allRecords": 900},
        ". On the base model as it is served (bfloat16, 64 of 900 records): loss 0.0310, 78.1% right; on the one that "
        "was trained on: loss 0.0109, 95.3% right",
    ),
    "one base that is both": (
        SERVED | {"sameBase": True},
        ". On the base model as it is served (bfloat16, 64 records): loss 0.0310, 78.1% right",
    ),
    "why it was not measured": (
        {"dtype": "bfloat16", "allRecords": 64, "problem": "it needs 40.00 GiB"},
        ". On the base model that was trained on: loss 0.0100, 95.0% right; not measured as it is served: it needs "
        "40.00 GiB",
    ),
    "figures that are missing are not made up": (
        {"dtype": "bfloat16", "records": 64, "allRecords": 64},
        ". On the base model that was trained on: loss 0.0100, 95.0% right; not measured as it is served: its loss is "
        "missing",
    ),
    "a trainer of an earlier release, or no evaluation records": (None, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_the_scores_are_said(name: str) -> None:
    served, want = CASES[name]
    adapter = AdapterStatus.model_validate(ADAPTER | ({} if served is None else {"served": served}))
    assert describe_scores(adapter) == want
    said = decide_success(1, adapter).conditions[ConditionType.PUBLISHED].message
    assert said == f"Published s3://m/a as a-v1{want}"


def test_an_adapter_of_the_release_before_is_read_and_nothing_is_said_of_what_it_lacks() -> None:
    status = json.loads((RECORDED / "finished.json").read_text())["run"]["status"]
    adapter = AdapterStatus.model_validate(status["adapter"])
    assert (adapter.served, adapter.eval_share_after, adapter.gate_base) == (None, None, None)
    assert describe_scores(adapter) == ""
    assert adapter.to_wire() == status["adapter"], "nothing is added to it"
