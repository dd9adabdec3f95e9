"""The report and the model card: harmless, complete, honest."""

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_api.data import DataReport, LengthHistogram
from lora_api.run import RunSpec
from lora_api.served import Score, ServedEvaluation
from lora_trainer.card import build_card
from lora_trainer.charts import Series, bar_chart, line_chart, nice_ticks, show_number, thin
from lora_trainer.evaluate import Evaluation, Sample
from lora_trainer.metrics import read_metrics
from lora_trainer.report import RunResult, build_report, histogram_bars
from lora_trainer.verify import Verification
from tests.trainer.runs import build_run

EVIL = "<script>alert('x')</script> & \"quotes\""

HISTORY = [
    {"step": step, "loss": 2.0 / step, "learning_rate": 2e-4, "grad_norm": 0.7, "tokens_per_second": 9000.0}
    for step in range(1, 4)
]

DATA = DataReport(
    train_records=40, tokens=4000, supervised_tokens=900, sequences=40, longest=300, truncated_records=2,
    histogram=LengthHistogram(bounds=[64, 128, 256, 512], counts=[5, 20, 10, 5, 0]),
)  # fmt: skip
LEAKED = DATA.model_copy(update={"eval_records": 8, "leaked_records": 4})


SERVED = ServedEvaluation(
    dtype="bfloat16", records=4, all_records=8, before=Score(loss=2.6, share=0.0), after=Score(loss=0.31, share=0.75),
    training=Score(loss=0.26, share=1.0),
)  # fmt: skip
WORSE_AS_SERVED = SERVED.model_copy(update={"after": Score(loss=2.7, share=0.0)})


class Page(HTMLParser):
    """Collects tags, and refuses a page whose tags do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.seen)


def make_run(**changes: Any) -> RunSpec:
    return build_run(Path("/model"), Path("/data"), Path("/work"), changes)


def make_result(**changes: Any) -> RunResult:
    before = Evaluation(2.5, [Sample(EVIL, "right", "wrong")])
    after = Evaluation(0.25, [Sample(EVIL, "right", "right ")])
    values: dict[str, Any] = {
        "before": before, "after": after, "metrics": read_metrics(HISTORY, before, after, 3), "steps": 3,
        "train_records": 40, "eval_records": 8, "versions": {"torch": EVIL}, "data": DATA,
        "memory": [("planned", "10.0 GiB")], "verification": Verification(0.25, 0.25),
    }  # fmt: skip
    return RunResult(**{**values, **changes})


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


def test_the_report_is_one_harmless_file() -> None:
    text = build_report(make_run(baseModel={"uri": "file:///a<b>"}), make_result())
    page = read_page(text)
    assert not [tag for tag, _ in page.seen if tag in ("script", "link", "img", "iframe", "object", "embed")]
    sources = ("src", "href", "xlink:href", "action", "srcdoc")
    assert not [value for _, attributes in page.seen for name, value in attributes.items() if name in sources]
    assert not [name for _, attributes in page.seen for name in attributes if name.startswith("on")]
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "file:///a&lt;b&gt;" in text


def test_the_report_shows_what_happened() -> None:
    run = make_run(publish={"gate": {"maxEvalLoss": 1.0, "minEvalLossImprovement": 0.1}})
    text = build_report(run, make_result(skipped_steps=2))
    page = read_page(text)
    assert text.count('class="right"') == 1
    assert page.count("svg") == 5, "loss, learning rate, gradient norm, speed, lengths of records"
    assert page.count("polyline") == 4
    assert page.count("circle") == 2, "evaluations before and after"
    assert page.count("rect") == 4
    for words in (
        "2.5000", "0.2500", "2.2500", "training.learningRate", "lora.targetModules", "10.0 GiB",
        "an improvement of at least 0.1 and a loss of at most 1: passed",
        "evaluation loss 0.250000, in memory 0.250000",
        "not finite</th><td class=\"number\">2<", "2 cut at maxSeqLength",
    ):  # fmt: skip
        assert words in text, words
    assert "Not published" not in text


def test_a_run_on_preference_pairs_shows_its_rewards() -> None:
    before = Evaluation(0.7, [], reward_margin=0.0, reward_accuracy=0.5)
    after = Evaluation(0.2, [], reward_margin=1.5, reward_accuracy=0.9)
    history = [{"step": step, "loss": 0.5, "reward_margin": 1.0, "reward_accuracy": 0.75} for step in (1, 2)]
    result = make_result(before=before, after=after, metrics=read_metrics(history, before, after, 2))
    assert [metric.reward_accuracy for metric in result.metrics] == [0.5, 0.75, 0.75, 0.9]
    text = build_report(make_run(training={"objective": "dpo"}), result)
    assert read_page(text).count("circle") == 6, "evaluations of loss, margin and accuracy"
    assert "Reward margin" in text
    assert "Reward accuracy" in text
    assert "nats per token" not in text
    card = build_card(make_run(training={"objective": "dpo"}), result)
    for words in ("DPO loss, mean over pairs", "of 8 pairs", "tells chosen from rejected"):
        assert words in card, words
    assert "Reward" not in build_report(make_run(), make_result())


REPORTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "a refused adapter says so at the top": (
        {"publish": {"gate": {"maxEvalLoss": 0.1}}},
        {"refusal": "the loss <is> too large", "verification": None},
        ["Not published: the loss &lt;is&gt; too large.", "a loss of at most 0.1: refused", "so not read back"],
    ),
    "an adapter that is worse than nothing says so": (
        {}, {"after": Evaluation(2.6, [Sample("p", None, "x")])}, ["no better than before training", "-0.1000"],
    ),
    "an adapter that is worse than nothing on the base as it is served says so": (
        {}, {"served": WORSE_AS_SERVED},
        ["The evaluation loss on the base as it is served (bfloat16, 4 of 8 records) is no better than before"],
    ),
    "without records there are no losses": (
        {}, {"before": Evaluation(None, []), "after": Evaluation(None, []), "verification": Verification(None, None)},
        ["no sample prompts", "the same bytes; there are no records"],
    ),
    "what the records are not is said beside them": (
        {}, {"data": LEAKED}, ["4 of 8 evaluation records are also training records", '<p class="note bad">dataset:'],
    ),
    "nothing was logged": ({}, {"metrics": [], "data": None, "memory": ()}, ["Nothing was logged", "not set: every"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REPORTS)
def test_the_report_of_a_run_that_went_otherwise(case: str) -> None:
    changes, results, words = REPORTS[case]
    text = build_report(make_run(**changes), make_result(**results))
    read_page(text)
    assert [word for word in words if word not in text] == []


TICKS = ((0.0, 0.0), (2.0, 2.0), (0.1, 2.0), (1.1, 1.3), (0.0, 2e-4), (900.0, 12e3), (-1.0, -0.5), (3e-5, 2e-4))


@pytest.mark.parametrize("ends", TICKS)
def test_the_marks_of_an_axis_hold_all_values_and_differ(ends: tuple[float, float]) -> None:
    ticks = nice_ticks(*ends)
    assert ticks[0] <= ends[0] <= ends[1] <= ticks[-1]
    assert 2 <= len(ticks) <= 11
    assert len({show_number(tick) for tick in ticks}) == len(ticks)


def test_numbers_of_an_axis() -> None:
    assert [show_number(value) for value in (0, 0.25, 2e-4, 1.5e-5, 12_000, 1.1000000001)] == [
        "0", "0.25", "2e-4", "1.5e-5", "12k", "1.1",
    ]  # fmt: skip


def test_charts_leave_out_what_is_no_number_and_stay_small() -> None:
    assert "Nothing was logged" in line_chart("x", "", [Series("a", [(0, math.nan)])])
    assert "<circle" in line_chart("x", "", [Series("a", [(3, 0.0)])]), "one point alone is a dot"
    many = [(step, math.sin(step)) for step in range(50_000)]
    assert len(line_chart("x", "", [Series("a", many)])) < 20_000
    kept = thin(many, 400)
    assert (len(kept), kept[0], kept[-1]) == (400, many[0], many[-1])
    assert "There are none" in bar_chart("x", "", [("a", 0)])


def test_bars_end_with_the_longest_record() -> None:
    assert histogram_bars(LengthHistogram(bounds=[8, 16], counts=[1, 0, 0])) == [("≤8", 1)]
    assert histogram_bars(LengthHistogram(bounds=[8], counts=[0, 3])) == [("≤8", 0), (">8", 3)]
    assert histogram_bars(LengthHistogram(counts=[2])) == [("all", 2)]


def test_the_card_is_read_by_the_hub() -> None:
    card = build_card(make_run(baseModel={"uri": "hf://org/model", "revision": "abc"}), make_result())
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/model"
    assert front["tags"] == ["lora", "qlora"]
    assert "| 2.5000 | 0.2500 |" in card
    assert 'from_pretrained("org/model", revision="abc")' in card
    assert "vllm serve org/model --enable-lora --max-lora-rank 8" in card


CARDS: dict[str, tuple[dict[str, Any], dict[str, Any], str, bool]] = {
    "few evaluation records are a limit": ({}, {}, "only 8 records", True),
    "many are none": ({}, {"eval_records": 500}, "small differences", False),
    "no evaluation is a limit": ({}, {"after": Evaluation(None, [])}, "It was not evaluated", True),
    "no better than the base as it is served is a limit": ({}, {"served": WORSE_AS_SERVED}, "no better than", True),
    "better than the base as it is served is none": (
        {},
        {"after": Evaluation(2.5, []), "served": SERVED},
        "no better than",
        False,
    ),
    "no better than the base is a limit": ({}, {"after": Evaluation(2.5, [])}, "no better than the base", True),
    "quantization is a limit": ({}, {}, "base weights in nf4", True),
    "without quantization it is none": ({"quantization": {"type": "none"}}, {}, "base weights in", False),
    "what was measured on the base as it is served is no limit": (
        {},
        {"served": SERVED},
        "base weights in nf4",
        False,
    ),
    "the base as it is served comes first": (
        {},
        {"served": SERVED},
        "| base weights as served (bfloat16), 4 of 8 records | 2.6000 | 0.3100 | 0.0% | 75.0% |\n"
        "| base weights that it was trained on (nf4), the same records | - | 0.2600 | - | 100.0% |\n"
        "| base weights that it was trained on (nf4), 8 records | 2.5000 | 0.2500 | - | - |\n",
        True,
    ),
    "why it was not measured there is a limit": (
        {},
        {"served": ServedEvaluation(dtype="bfloat16", all_records=8, problem="it is too large")},
        "On unquantized weights they differ, and were not measured: it is too large.",
        True,
    ),
    "one base that is both is one row": (
        {"quantization": {"type": "none"}},
        {"served": SERVED.model_copy(update={"same_base": True})},
        "| base weights as served and as trained on (bfloat16), 8 records | 2.5000 | 0.2500 | - | - |",
        True,
    ),
    "cut records are a limit": ({}, {}, "2 training records were cut at 64 tokens", True),
    "evaluation records that are trained on are a limit": ({}, {"data": LEAKED}, "too good to be true", True),
    "others are none": ({}, {}, "too good to be true", False),
    "skipped steps are a limit": ({}, {"skipped_steps": 3}, "3 steps were skipped", True),
    "a merged model is named": ({"publish": {"mergeBase": True}}, {}, "`merged/`", True),
    "no merged model is not": ({}, {}, "`merged/`", False),
}


def test_the_report_tells_both_bases_and_which_the_gate_looked_at() -> None:
    page = build_report(make_run(publish={"gate": {"maxEvalLoss": 1.0}}), make_result(served=SERVED))
    read_page(page)
    for text in (
        "On 4 of 8 records, all three the same.", "0.3100", "75.0%", "0.2600", "100.0%",
        "a loss of at most 1 on the base as it is served (bfloat16, 4 of 8 records): passed", "Exactly right as served",
    ):  # fmt: skip
        assert text in page
    evil = ServedEvaluation(dtype=EVIL, all_records=8, problem=EVIL)
    text = build_report(make_run(publish={"gate": {"maxEvalLoss": 1.0}}), make_result(served=evil))
    assert read_page(text).count("script") == 0


@pytest.mark.parametrize("case", CARDS)
def test_the_card_is_honest(case: str) -> None:
    changes, results, words, there = CARDS[case]
    assert (words in build_card(make_run(**changes), make_result(**results))) is there
