"""report.html and README.md: whatever the texts in them are, nothing runs and nothing breaks out of its place."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lora_api.data import DataReport, LengthHistogram
from lora_api.run import RunSpec
from lora_trainer.card import build_card, build_merged_card
from lora_trainer.charts import Series, bar_chart, line_chart
from lora_trainer.evaluate import Evaluation, Sample
from lora_trainer.metrics import read_metrics
from lora_trainer.report import RunResult, build_report
from tests.trainer.runs import merge

NASTY = [
    "<script>alert(1)</script>",
    "</td></table><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</svg><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "' onmouseover='alert(1)",
    "<svg/onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "javascript:alert(1)",
    "[x](javascript:alert(1))",
    "![x](https://attacker.example/pixel.png)",
    "[x]: javascript:alert(1)",
    "<https://attacker.example>",
    "https://attacker.example/",
    "x\n---\nlicense: mit\n---\n",
    "x\n\n# A heading",
    "x\n\n<script>alert(1)</script>",
    "`x` <script>alert(1)</script> `",
    "``` \n<script>",
    "x`\n```\n\n<script>alert(1)</script>",
    "x | y | z",
    "x; rm -rf ~",
    "$(touch /tmp/x)",
    "x\\",
    "&lt;script&gt;",
    "<!--",
    "]]>",
    "\u2028<script>",
    "\x00\x0b\x0c",
    "{{ 7 * 7 }}",
    "\u202ereversed",
]
TEXT = (
    st.sampled_from(NASTY) | st.lists(st.sampled_from(NASTY), min_size=2, max_size=3).map("".join) | st.text(min_size=1)
)
SAFE_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "b", "pre", "span"),
    *("table", "tr", "th", "td", "figure", "figcaption", "svg", "line", "text", "polyline", "circle", "rect"),
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text of the last one that was asked for."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag}: an attribute twice"
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def check_page(text: str) -> Page:
    """No script, no address, nothing that is not ours."""
    page = Page()
    page.feed(text)
    page.close()
    assert page.comments == []
    for tag, attributes in page.elements:
        assert tag in SAFE_TAGS
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name not in {"href", "src", "srcset", "action", "formaction", "xlink:href", "background", "srcdoc"}
            if name == "style":
                assert re.fullmatch(r"background:#[0-9a-f]{6}", value or ""), value
    return page


def a_run(text: str, **changes: Any) -> RunSpec:
    """A run whose every free text is ``text``, as one that no API server has looked at."""
    document: dict[str, Any] = {
        "namespace": text or "n",
        "name": text or "n",
        "uid": "u",
        "baseModel": {"uri": "file:///m", "revision": None},
        "dataset": {"train": {"uri": "file:///d"}, "systemPrompt": text[:16000] or "s"},
        "training": {"maxSteps": 3, "globalBatchSize": 8},
        "publish": {"store": "file:///s", "samplePrompts": [text or "p"], "mergeBase": True},
        "tracking": {"mlflow": {"trackingUri": "http://x/", "experiment": text[:100] or "e"}},
    }
    run = RunSpec.model_validate(merge(document, changes))
    base = run.base_model.model_copy(update={"uri": f"hf://org/{text}", "revision": text or None})
    lora = run.lora.model_copy(update={"new_tokens": [text]})
    return run.model_copy(update={"base_model": base, "lora": lora})


def a_result(text: str) -> RunResult:
    before = Evaluation(2.5, [Sample(text, text, text)])
    after = Evaluation(0.25, [Sample(text, text, text + " ")])
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    histogram = LengthHistogram(bounds=[64, 128], counts=[5, 20, 0])
    data = DataReport(train_records=4, tokens=4, supervised_tokens=4, sequences=4, longest=4, histogram=histogram)
    return RunResult(
        before=before, after=after, metrics=read_metrics(history, before, after, 3), steps=3, train_records=40,
        eval_records=8, versions={text: text}, data=data, memory=[(text, text)], refusal=text,
    )  # fmt: skip


@given(TEXT)
def test_nothing_in_a_report_runs(text: str) -> None:
    """Attack: who writes the dataset, the model or the run puts a script where the report shows it."""
    plain = check_page(build_report(a_run("plain"), a_result("plain")))
    page = check_page(build_report(a_run(text), a_result(text)))
    names = [tag for tag, _ in page.elements]
    assert names == [tag for tag, _ in plain.elements], "a text makes or ends no element"


@given(TEXT, TEXT)
def test_nothing_in_a_chart_runs(title: str, unit: str) -> None:
    """Attack: a name that a chart shows has a script in it."""
    check_page(line_chart(title, unit, [Series(title, [(1, 1.0), (2, 2.0)]), Series(unit, [(1, 1.0)], dots=True)]))
    check_page(bar_chart(title, unit, [(title, 3), (unit, 4)]))


def test_a_browser_is_told_to_run_nothing() -> None:
    """Attack: a text comes into the report that nobody thought of escaping."""
    elements = check_page(build_report(a_run("plain"), a_result("plain"))).elements
    policies = [position for position, (_, found) in enumerate(elements) if found.get("http-equiv")]
    [position] = policies
    assert elements[position][1] == {"http-equiv": "Content-Security-Policy", "content": POLICY}
    assert [tag for tag, _ in elements[:position]] == ["html", "head"], "before anything that it is to stop"


def tokens_of(text: str) -> list[Token]:
    """A README as a strict reader of Markdown (CommonMark with tables) sees it."""
    _, _, body = text[4:].partition("\n---\n")
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return [inner for token in found for inner in (token, *(token.children or []))]


def shape(text: str) -> list[str]:
    return [token.type for token in tokens_of(text) if token.type not in ("text", "softbreak", "code_inline")]


@pytest.mark.parametrize("build", [build_card, build_merged_card])
@given(text=TEXT)
def test_nothing_breaks_out_of_a_model_card(build: Any, text: str) -> None:
    """Attack: who names the base model, a token or the run puts Markdown, HTML or YAML into the name."""
    card = build(a_run(text), a_result(text))
    plain = build(a_run("plain"), a_result("plain"))
    assert card.startswith("---\n")
    front = yaml.safe_load(card[4:].partition("\n---\n")[0])
    assert front.keys() == yaml.safe_load(plain[4:].partition("\n---\n")[0]).keys()
    kinds = {token.type for token in tokens_of(card)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image"}
    assert shape(card) == shape(plain), "a text makes or ends no part of the page"


@given(TEXT)
def test_the_commands_of_a_model_card_do_what_they_say(text: str) -> None:
    """Attack: who names the base model puts a command into the name, for people to copy into their shell."""
    import ast
    import shlex

    card = build_card(a_run(text), a_result(text))
    fences = {token.info: token.content for token in tokens_of(card) if token.type == "fence"}
    words = shlex.split(fences["sh"].replace("\\\n", " "))
    assert words[:2] == ["vllm", "serve"]
    assert words[3:5] == ["--enable-lora", "--max-lora-rank"]
    assert len(words) == 8
    calls = [node for node in ast.walk(ast.parse(fences["python"])) if isinstance(node, ast.Call)]
    assert len(calls) == 2
