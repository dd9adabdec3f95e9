"""What the report on the data says, and that it survives the way through JSON."""

import json

import pytest
from pydantic import ValidationError

from lora_api.data import DataReport, LengthHistogram

PLAIN = DataReport(
    train_records=1200, eval_records=60, tokens=81000, supervised_tokens=9000, sequences=1200, longest=99
)
CUT = PLAIN.model_copy(
    update={"sequences": 40, "truncated_records": 3, "lost_token_share": 0.0125, "dropped_records": 1}
)


def test_the_report_is_one_line_for_people() -> None:
    assert PLAIN.to_text() == (
        "1,200 records to train on, 60 to evaluate on; 81,000 tokens an epoch, 9,000 of them learned; "
        "the longest record has 99"
    )
    assert "in 40 packed sequences" in CUT.to_text()
    assert CUT.to_text().endswith(
        "3 cut at maxSeqLength, 1.25% of tokens lost; 1 dropped: nothing to learn is left of them"
    )


def test_the_report_comes_back_from_json() -> None:
    report = CUT.model_copy(update={"histogram": LengthHistogram(bounds=[8, 16], counts=[1, 2, 3])})
    assert DataReport.model_validate_json(json.dumps(report.to_wire())) == report
    assert report.to_wire()["histogram"] == {"bounds": [8, 16], "counts": [1, 2, 3]}


def test_what_is_not_as_it_seems_is_a_sentence_with_its_remedy() -> None:
    assert PLAIN.warnings == []
    leaked, doubled = PLAIN.model_copy(update={"leaked_records": 12, "doubled_bos": 1100}).warnings
    assert leaked == (
        "dataset: 12 of 60 evaluation records are also training records, so the evaluation loss is too good to be "
        "true; take them out of one of the two"
    )
    assert doubled.startswith("dataset: 1,100 records have a beginning-of-text token (BOS) of their own beside that of")
    assert doubled.endswith("one was taken away. Prompts to the served model must have one, too: send them without it")


def test_a_histogram_has_one_count_more_than_bounds() -> None:
    with pytest.raises(ValidationError, match="one count more"):
        LengthHistogram(bounds=[8], counts=[1])
