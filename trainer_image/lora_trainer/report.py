"""report.html: one file that tells how a run went. No scripts and nothing from the network, so it works anywhere."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_api.run import RunSpec
from lora_trainer.evaluate import Evaluation, Sample

Point = tuple[int, float]

WIDTH, HEIGHT, MARGIN = 720, 260, 46
TICKS = 4

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; } .muted { color: #667; }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid #dde; padding: .35rem .6rem;
text-align: left; vertical-align: top; } th { font-weight: 600; } td.number { font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; }
.right { background: #e9f7ec; } svg text { font: 11px system-ui, sans-serif; fill: #667; }
.tiles { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1rem 0; } .tile { padding: .6rem 1rem;
border: 1px solid #dde; border-radius: 8px; } .tile b { display: block; font-size: 1.3rem; }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #dde3ea; } .right { background: #17351f; }
td, th, .tile { border-color: #333c46; } svg text, .muted { fill: #9ab; color: #9ab; } }
"""


@dataclass(frozen=True)
class RunResult:
    """What a run has to tell. ``train_losses`` and ``eval_losses`` are pairs of step and loss (nats per token)."""

    before: Evaluation
    after: Evaluation
    train_losses: Sequence[Point]
    eval_losses: Sequence[Point]
    steps: int
    train_records: int
    eval_records: int
    versions: dict[str, str]


def split_history(history: Iterable[dict[str, Any]]) -> tuple[list[Point], list[Point]]:
    """Training and evaluation losses in the trainer's log history."""
    train, evaluation = [], []
    for entry in history:
        if "loss" in entry:
            train.append((int(entry["step"]), float(entry["loss"])))
        if "eval_loss" in entry:
            evaluation.append((int(entry["step"]), float(entry["eval_loss"])))
    return train, evaluation


def build_report(run: RunSpec, result: RunResult) -> str:
    """The whole page."""
    title = escape(f"{run.namespace}/{run.adapter_name}")
    evaluation = [(0, result.before.loss), *result.eval_losses, (result.steps, result.after.loss)]
    eval_points = [(step, loss) for step, loss in evaluation if loss is not None]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{title}</h1><p class="muted">LoRA adapter of {escape(run.base_model.uri)}</p>\n'
        f"{_tiles(result)}\n<h2>Loss</h2>\n{build_chart(result.train_losses, eval_points)}\n"
        f"<h2>Answers before and after</h2>\n{_samples(result.before.samples, result.after.samples)}\n"
        f"<h2>Parameters</h2>\n{_table(_parameters(run, result))}\n"
        f"<h2>Versions</h2>\n{_table(result.versions.items())}\n</body></html>\n"
    )


def show_loss(loss: float | None) -> str:
    """A loss for people."""
    return "-" if loss is None else f"{loss:.4f}"


def _tiles(result: RunResult) -> str:
    tiles = [
        ("Evaluation loss before", show_loss(result.before.loss)),
        ("Evaluation loss after", show_loss(result.after.loss)),
        ("Steps", str(result.steps)),
        ("Training records", str(result.train_records)),
        ("Evaluation records", str(result.eval_records)),
    ]
    inner = "".join(f'<div class="tile">{escape(name)}<b>{escape(value)}</b></div>' for name, value in tiles)
    return f'<div class="tiles">{inner}</div>'


def build_chart(train: Sequence[Point], evaluation: Sequence[Point]) -> str:
    """The loss curve as SVG: a line for training, dots for evaluations. Points that are not finite are left out."""
    train = [point for point in train if math.isfinite(point[1])]
    evaluation = [point for point in evaluation if math.isfinite(point[1])]
    points = [*train, *evaluation]
    if not points:
        return '<p class="muted">No losses were logged.</p>'
    last = max(1, max(step for step, _ in points))
    top = max(loss for _, loss in points) * 1.05 or 1.0

    def place(point: Point) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * point[0] / last
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * max(point[1], 0.0) / top

    grid = []
    for tick in range(TICKS + 1):
        value = top * tick / TICKS
        _, y = place((0, value))
        step = round(last * tick / TICKS)
        x, _ = place((step, 0.0))
        grid.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
            f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step}</text>'
        )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, train))
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#d9582b"/>' for x, y in map(place, evaluation))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss by step">{"".join(grid)}'
        f'<polyline points="{line}" fill="none" stroke="#2b6cd9" stroke-width="2"/>{dots}'
        f'<text x="{WIDTH - MARGIN}" y="16" text-anchor="end">blue: training loss, orange: evaluation loss, '
        "by optimizer step (nats per token)</text></svg>"
    )


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


def _parameters(run: RunSpec, result: RunResult) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for section in ("baseModel", "dataset", "lora", "quantization", "training", "parallelism"):
        found.extend(_flatten(section, run.to_wire()[section]))
    return found


def _flatten(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flatten(f"{name}.{key}", inner)]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f'<tr><th>{escape(name)}</th><td class="number">{escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{inner}</table>"
