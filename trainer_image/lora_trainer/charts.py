"""Small charts as SVG text. No scripts, and colours that read on a light and on a dark page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[int, float]

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30
BLUE, ORANGE = "#3b78dd", "#e0662f"
MAX_POINTS = 400
"""Points of a line. More cannot be told apart in this width, and make the page large."""


@dataclass(frozen=True)
class Series:
    """Pairs of optimizer step and value, drawn as a line or as dots."""

    name: str
    points: Sequence[Point]
    color: str = BLUE
    dots: bool = False


def line_chart(title: str, unit: str, series: Sequence[Series]) -> str:
    """A chart by optimizer step. Values that are not finite are left out; without any left, it says so."""
    drawn = [
        Series(one.name, [point for point in one.points if math.isfinite(point[1])], one.color, one.dots)
        for one in series
    ]
    values = [value for one in drawn for _, value in one.points]
    if not values:
        return _figure(title, unit, drawn, '<p class="muted">Nothing was logged.</p>')
    last = max(1, max(step for one in drawn for step, _ in one.points))
    ticks = nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / last
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (point[1] - low) / (high - low)

    shapes = [_grid_line(place((0, tick))[1], tick) for tick in ticks]
    shapes += [_step_label(place((step, low))[0], step) for step in step_ticks(last)]
    for one in drawn:
        points = [place(point) for point in thin(one.points, MAX_POINTS)]
        if one.dots or len(points) == 1:
            shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{one.color}"/>' for x, y in points]
        elif points:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            shapes.append(f'<polyline points="{line}" fill="none" stroke="{one.color}" stroke-width="1.8"/>')
    return _figure(title, unit, drawn, _svg(title, shapes))


def bar_chart(title: str, unit: str, bars: Sequence[tuple[str, int]]) -> str:
    """One bar for each pair of label and count."""
    if not any(count for _, count in bars):
        return _figure(title, unit, [], '<p class="muted">There are none.</p>')
    ticks = nice_ticks(0.0, float(max(count for _, count in bars)))
    step = (WIDTH - LEFT - RIGHT) / len(bars)
    inner = HEIGHT - TOP - BOTTOM
    shapes = [_grid_line(HEIGHT - BOTTOM - inner * tick / ticks[-1], tick) for tick in ticks]
    for index, (label, count) in enumerate(bars):
        x, tall = LEFT + index * step, inner * count / ticks[-1]
        shapes.append(
            f'<rect x="{x + step * 0.1:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{step * 0.8:.1f}" '
            f'height="{tall:.1f}" fill="{BLUE}"><title>{escape(label)}: {count}</title></rect>'
        )
        if index % max(1, -(-len(bars) // 8)) == 0:
            shapes.append(f'<text x="{x + step / 2:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(label)}</text>')
    return _figure(title, unit, [], _svg(title, shapes))


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to eleven round values, evenly apart, that hold ``low`` and ``high`` between their ends.

    They begin at 0 where the values come near it: a curve from 2.0 to 0.1 is seen against 0, one from 1.3 to 1.1 not.
    """
    low = min(low, 0.0) if low <= high / 2 or high <= 0 else low
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    gap = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 10 >= span * 1.8)
    first = math.floor(low / gap + 1e-9)
    count = max(1, math.ceil(high / gap - 1e-9) - first)
    return [round((first + index) * gap, 12) for index in range(count + 1)]


def step_ticks(last: int) -> list[int]:
    """Steps to write below a chart that ends at step ``last``."""
    return sorted({round(last * part / 4) for part in range(5)})


def thin(points: Sequence[Point], limit: int) -> Sequence[Point]:
    """At most ``limit`` of ``points``, evenly apart, the first and the last among them."""
    if len(points) <= limit:
        return points
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def show_number(value: float) -> str:
    """A number for an axis: 0.0002 as 2e-4, 12000 as 12k."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if abs(value) < 0.001:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def _grid_line(y: float, value: float) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8885"/>'
        f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{show_number(value)}</text>'
    )


def _step_label(x: float, step: int) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{step}</text>'


def _svg(title: str, shapes: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg>'


def _figure(title: str, unit: str, series: Sequence[Series], inner: str) -> str:
    keys = "".join(
        f'<span class="key"><span style="background:{one.color}"></span>{escape(one.name)}</span>'
        for one in series
        if len(series) > 1
    )
    unit_text = f' <span class="muted">{escape(unit)}</span>' if unit else ""
    return f"<figure><figcaption>{escape(title)}{unit_text}{keys}</figcaption>{inner}</figure>"
