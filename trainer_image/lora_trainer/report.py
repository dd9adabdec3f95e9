"""report.html: one file that tells how a run went. No scripts and nothing from the network, so it works anywhere."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_api.data import DataReport, LengthHistogram
from lora_api.publishing import Gate
from lora_api.run import RunSpec
from lora_api.served import Score, ServedEvaluation
from lora_trainer.charts import ORANGE, Series, bar_chart, line_chart
from lora_trainer.evaluate import Evaluation, Sample
from lora_trainer.gate import Losses, choose_losses
from lora_trainer.metrics import Metric, pick
from lora_trainer.verify import Verification

POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
"""Tells a browser to run and to fetch nothing, should a text of others ever come through unescaped."""

PARAMETER_SECTIONS = ("baseModel", "dataset", "lora", "quantization", "training", "parallelism", "publish")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c2733;
background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; } .muted { color: #667; }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid #dde; padding: .35rem .6rem;
text-align: left; vertical-align: top; } th { font-weight: 600; } td.number { font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; }
.right { background: #e9f7ec; } .bad { background: #fdecea; } svg text { font: 11px system-ui, sans-serif; fill: #667; }
.note { border-left: 4px solid #3b78dd; padding: .4rem .8rem; } .note.bad { border-color: #c62f2f; }
.tiles { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1rem 0; } .tile { padding: .6rem 1rem;
border: 1px solid #dde; border-radius: 8px; } .tile b { display: block; font-size: 1.3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 30rem; } figcaption { font-weight: 600; } figcaption .muted { font-weight: 400; }
.key { font-weight: 400; margin-left: .8rem; } .key span { display: inline-block; width: .7rem; height: .7rem;
border-radius: 2px; margin-right: .3rem; }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #dde3ea; } .right { background: #17351f; }
.bad { background: #3d1d1b; } td, th, .tile { border-color: #333c46; } svg text, .muted { fill: #9ab; color: #9ab; } }
"""


@dataclass(frozen=True)
class RunResult:
    """What a run has to tell. ``skipped_steps`` had a loss or a gradient that is not finite, and changed nothing.

    ``served`` is how the adapter does on its base model as it is served. ``refusal`` is why publish.gate refused the
    adapter. ``memory`` are rows for people: what was planned and measured. ``resumed_from`` is the checkpoint of
    another run that this one began with.
    """

    before: Evaluation
    after: Evaluation
    metrics: Sequence[Metric]
    steps: int
    train_records: int
    eval_records: int
    versions: dict[str, str]
    data: DataReport | None = None
    memory: Sequence[tuple[str, str]] = ()
    skipped_steps: int = 0
    verification: Verification | None = None
    refusal: str | None = None
    served: ServedEvaluation | None = None
    resumed_from: str | None = None

    def gate_losses(self, gate: Gate | None) -> Losses:
        """The losses that ``gate`` looks at."""
        return choose_losses(gate, self.before.loss, self.after.loss, self.served)

    def figures(self, gate: Gate | None) -> dict[str, Any]:
        """What the manifest says of how good the adapter is, by its fields."""
        return {
            "eval_loss_before": self.before.loss,
            "eval_loss_after": self.after.loss,
            "eval_share_after": self.after.share,
            "served": self.served,
            "gate_base": None if gate is None else self.gate_losses(gate).base,
            "resumed_from": self.resumed_from,
        }

    @property
    def proven_loss(self) -> float | None:
        """The loss that what is read back from the store must have, on the model that is there after training."""
        served = self.served
        return served.after.loss if served is not None and served.is_measured else self.after.loss

    @property
    def has_rewards(self) -> bool:
        """Whether the run learned from preference pairs."""
        return any(metric.reward_margin is not None for metric in self.metrics)

    @property
    def loss_unit(self) -> str:
        """What the losses are, for people."""
        return "DPO loss, mean over pairs" if self.has_rewards else "nats per token"

    @property
    def share_name(self) -> str:
        """What the shares are, for people."""
        return "chosen preferred" if self.has_rewards else "exactly right"

    @property
    def improvement(self) -> float | None:
        """How much lower the evaluation loss is than before training, in ``loss_unit``."""
        if self.before.loss is None or self.after.loss is None:
            return None
        return self.before.loss - self.after.loss

    @property
    def is_no_better(self) -> bool:
        """Whether the loss is no lower than before training: on the base as it is served, where that was measured."""
        losses = self.gate_losses(None)
        return losses.before is not None and losses.after is not None and losses.after >= losses.before


def build_report(run: RunSpec, result: RunResult) -> str:
    """The whole page."""
    title = escape(f"{run.namespace}/{run.adapter_name}")
    sections = [
        ("The adapter as it is served", _served(result)),
        ("How training went", f'<div class="charts">{"".join(build_charts(result))}</div>'),
        ("Answers before and after", _samples(result.before.samples, result.after.samples)),
        ("Checks", _table(list_checks(run, result))),
        ("Data", _data(result.data)),
        ("Memory of one process", _table(result.memory) if result.memory else ""),
        ("Parameters", _table(list_parameters(run))),
        ("Versions", _table(result.versions.items())),
    ]
    body = "".join(f"<h2>{name}</h2>\n{content}\n" for name, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head>{POLICY}<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{title}</h1><p class="muted">LoRA adapter of {escape(run.base_model.uri)}, trained by '
        f"{escape(run.namespace)}/{escape(run.name)}</p>\n{_headline(result)}{_tiles(result)}\n{body}</body></html>\n"
    )


def show_loss(loss: float | None) -> str:
    """A loss for people."""
    return "-" if loss is None else f"{loss:.4f}"


def build_charts(result: RunResult) -> list[str]:
    """Loss, learning rate, gradient norm and speed, by optimizer step."""
    losses = [
        Series("training", pick(result.metrics, "loss")),
        Series("evaluation", pick(result.metrics, "eval_loss"), ORANGE, dots=True),
    ]
    return [
        line_chart("Loss", result.loss_unit, losses),
        *(_reward_charts(result.metrics) if result.has_rewards else []),
        line_chart("Learning rate", "", [Series("learning rate", pick(result.metrics, "learning_rate"))]),
        line_chart("Gradient norm", "before clipping", [Series("norm", pick(result.metrics, "grad_norm"))]),
        line_chart("Speed", "tokens per second", [Series("speed", pick(result.metrics, "tokens_per_second"))]),
    ]


def _reward_charts(metrics: Sequence[Metric]) -> list[str]:
    training = [metric for metric in metrics if metric.loss is not None]
    evaluation = [metric for metric in metrics if metric.eval_loss is not None]

    def draw(title: str, unit: str, name: str) -> str:
        series = [
            Series("training", pick(training, name)),
            Series("evaluation", pick(evaluation, name), ORANGE, dots=True),
        ]
        return line_chart(title, unit, series)

    return [
        draw("Reward margin", "of chosen over rejected, in nats times beta", "reward_margin"),
        draw("Reward accuracy", "share of pairs", "reward_accuracy"),
    ]


def list_checks(run: RunSpec, result: RunResult) -> list[tuple[str, str]]:
    """What was checked before the adapter was published, and what came of it."""
    gate, proof = run.publish.gate, result.verification
    checks = []
    if gate is None:
        checks.append(("publish.gate", "not set: every adapter is published"))
    else:
        asked = []
        if gate.min_eval_loss_improvement is not None:
            asked.append(f"an improvement of at least {gate.min_eval_loss_improvement:g}")
        if gate.max_eval_loss is not None:
            asked.append(f"a loss of at most {gate.max_eval_loss:g}")
        where = result.gate_losses(gate).where
        checks.append(("publish.gate", f"{' and '.join(asked)}{where}: {'refused' if result.refusal else 'passed'}"))
    if proof is None:
        checks.append(("Read back from the store", "not published, so not read back"))
    elif proof.from_store is None:
        checks.append(("Read back from the store", "the same bytes; there are no records to evaluate on"))
    else:
        checks.append(
            (
                "Read back from the store",
                f"the same bytes; evaluation loss {proof.from_store:.6f}, in memory {show_exact(proof.in_memory)}",
            )
        )
    skipped = str(result.skipped_steps) if result.skipped_steps else "none"
    checks.append(("Steps skipped because loss or gradient were not finite", skipped))
    return checks


def show_exact(loss: float | None) -> str:
    """A loss with as many digits as a comparison needs."""
    return "-" if loss is None else f"{loss:.6f}"


def _headline(result: RunResult) -> str:
    if result.refusal is not None:
        return f'<p class="note bad">Not published: {escape(result.refusal)}.</p>\n'
    if result.is_no_better:
        where = escape(result.gate_losses(None).where)
        return f'<p class="note bad">The evaluation loss{where} is no better than before training.</p>\n'
    return ""


def _tiles(result: RunResult) -> str:
    tiles = [
        ("Evaluation loss before", show_loss(result.before.loss)),
        ("Evaluation loss after", show_loss(result.after.loss)),
        ("Improvement", show_loss(result.improvement)),
        (result.share_name.capitalize(), show_share(result.after.share)),
        *_served_tiles(result),
        ("Steps", str(result.steps)),
        ("Training records", str(result.train_records)),
        ("Evaluation records", str(result.eval_records)),
    ]
    inner = "".join(f'<div class="tile">{escape(name)}<b>{escape(value)}</b></div>' for name, value in tiles)
    return f'<div class="tiles">{inner}</div>'


def _served_tiles(result: RunResult) -> list[tuple[str, str]]:
    found = result.served
    if found is None or found.same_base or not found.is_measured:
        return []
    loss, share = show_score(found.after)
    return [("Loss as served", loss), (f"{result.share_name.capitalize()} as served", share)]


def _served(result: RunResult) -> str:
    """The section on the base as it is served; empty without evaluation records."""
    found = result.served
    if found is None:
        return ""
    if found.problem is not None:
        return (
            f'<p class="note bad">Not measured on the base model in {escape(found.dtype)}: {escape(found.problem)}. '
            "All figures are those on the base that was trained on.</p>"
        )
    if found.same_base:
        return (
            f"<p>It was trained on the base model that is served ({escape(found.dtype)}): all figures hold for it.</p>"
        )
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td class=number>{escape(text)}</td>' for text in show_score(score))}</tr>"
        for name, score in (
            (f"base as it is served ({escape(found.dtype)}), without the adapter", found.before),
            (f"base as it is served ({escape(found.dtype)}), with the adapter", found.after),
            ("base that was trained on, with the adapter", found.training),
        )
    )
    return (
        f"<p>On {escape(found.describe_records())}, all three the same. Answers below are those on the base that was "
        f"trained on.</p><table><tr><th></th><th>Loss ({escape(result.loss_unit)})</th>"
        f"<th>{escape(result.share_name)}</th></tr>{rows}</table>"
    )


def show_score(score: Score) -> tuple[str, str]:
    """Loss and share for people."""
    return show_loss(score.loss), show_share(score.share)


def show_share(share: float | None) -> str:
    """A share for people, in percent with one digit: 78.1%."""
    return "-" if share is None else f"{share:.1%}"


def _data(data: DataReport | None) -> str:
    if data is None:
        return ""
    chart = bar_chart("Length of the training records", "tokens, before they are cut", histogram_bars(data.histogram))
    warnings = "".join(f'<p class="note bad">{escape(text)}.</p>' for text in data.warnings)
    return f'<p>{escape(data.to_text())}</p>{warnings}<div class="charts">{chart}</div>'


def histogram_bars(histogram: LengthHistogram) -> list[tuple[str, int]]:
    """Label and count of each part of the histogram that is not beyond the longest record."""
    labels = [f"≤{bound}" for bound in histogram.bounds]
    labels.append(f">{histogram.bounds[-1]}" if histogram.bounds else "all")
    bars = list(zip(labels, histogram.counts, strict=True))
    while bars and bars[-1][1] == 0:
        bars.pop()
    return bars


def _samples(before: Sequence[Sample], after: Sequence[Sample]) -> str:
    if not before:
        return '<p class="muted">There are no sample prompts.</p>'
    rows = []
    for old, new in zip(before, after, strict=True):
        cells = [_cell(new.prompt), _cell(new.expected or "-"), _answer(old), _answer(new)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("Prompt", "Expected", "Before", "After"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _answer(sample: Sample) -> str:
    right = sample.expected is not None and sample.answer.strip() == sample.expected.strip()
    return _cell(sample.answer, ' class="right"' if right else "")


def _cell(text: str, attributes: str = "") -> str:
    return f"<td{attributes}><pre>{escape(text)}</pre></td>"


def list_parameters(run: RunSpec) -> list[tuple[str, str]]:
    """Every parameter of ``run`` by its path in the manifest."""
    wire = run.to_wire()
    return [pair for section in PARAMETER_SECTIONS for pair in _flatten(section, wire.get(section, {}))]


def _flatten(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flatten(f"{name}.{key}", inner)]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f'<tr><th>{escape(name)}</th><td class="number">{escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{inner}</table>"
