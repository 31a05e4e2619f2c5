"""Line charts as SVG, with axes, marks of events, and the values that the page shows on hover and by keyboard."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _FOOT = 460, 210, 50, 452, 8, 186  # of the drawing, and the edges of its axes
_POINTS, _FEW = 400, 60  # of a curve that is drawn; of one whose points are marked
_EARLY = 0.05  # of the steps, whose values do not stretch the axis


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in order of x; colour: its number in the page's palette; errors: of y, None where not known.

    kind: "line", "dots" (measured now and then), or "rule" (what the others are compared with).
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    kind: Literal["line", "dots", "rule"] = "line"
    errors: Sequence[float | None] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over steps; marks: (step, "checkpoint" or "resumed", what a pointer over it shows)."""

    key: str
    title: str
    unit: str
    curves: Sequence[Curve]
    marks: Sequence[tuple[int, str, str]] = ()
    from_zero: bool = False


def shown(value: float | None) -> str:
    """Return a number with four digits or more, by thousands; an en dash for None."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:,.{3 - math.floor(math.log10(abs(value)))}f}" if abs(value) >= 1 else f"{value:.4g}"


def thin(points: Sequence[tuple[float, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """Return at most so many points: of equal parts the lowest and the highest, and the last of all."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / (most - 1))
    kept = {len(points) - 1}
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def draw(chart: Chart) -> tuple[str, dict[str, Any]]:
    """Return a figure, and what a page's script needs to show its values."""
    # Where values stand. What the first steps lose is many times the rest, and would flatten it.
    curves = [(c, thin(c.points) if c.kind == "line" else list(c.points)) for c in chart.curves if c.points]
    xs = [x for _, points in curves for x, _ in points]
    (left, right), late = (min(xs), max(xs)), []
    for curve, points in curves:
        whole = chart.from_zero and curve.kind != "line"
        since = left if whole else points[0][0] + _EARLY * (points[-1][0] - points[0][0])
        spread = [*curve.errors, *[None] * len(points)]
        late += [y + (error or 0) for (x, y), error in zip(points, spread, strict=False) if x >= since]
    low, high = (0.0 if chart.from_zero else min(y for _, points in curves for _, y in points)), max(late)
    pad = 0.06 * (high - low) or abs(high) / 2 or 1.0
    low, high, right = low - pad * (not chart.from_zero), high + pad, right if right > left else left + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across, down = (x - left) / (right - left), (y - low) / (high - low)
        return round(_LEFT + across * (_RIGHT - _LEFT), 1), round(_FOOT - down * (_FOOT - _TOP), 1)

    # Axes.
    parts = []
    for y in _ticks(low, high, 4):
        height = at(left, y)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {height}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{_tick(y)}</text>')
    parts.append(f'<text x="{_LEFT - 6}" y="{_FOOT + 15}" text-anchor="end">step</text>')
    for x in _ticks(left, right, 5, whole=True):
        place = at(x, low)[0]
        anchor = "end" if place > _RIGHT - 12 else "middle"
        parts.append(f'<text x="{place}" y="{_FOOT + 15}" text-anchor="{anchor}">{x:,.0f}</text>')

    # Curves; one goes above the axes where its first values do.
    key, name = escape(chart.key), re.sub(r"\W", "-", chart.key)
    box = f'x="{_LEFT}" y="{_TOP - 4}" width="{_RIGHT - _LEFT + 5}" height="{_FOOT - _TOP + 5}"'
    parts.append(f'<clipPath id="clip-{name}"><rect {box}/></clipPath><g clip-path="url(#clip-{name})">')
    for curve, points in curves:
        path = "L".join("{} {}".format(*at(x, y)) for x, y in points)
        parts.append(f'<g class="c{curve.colour % 8} {curve.kind}"><path d="M{path}"/>')
        for (x, y), error in zip(points, curve.errors, strict=False):
            if error:
                (place, top), (_, foot) = at(x, y + error), at(x, y - error)
                parts.append(f'<path d="M{place} {top}V{foot}"/>')
        if curve.kind == "dots" or (curve.kind == "line" and len(points) == 1):
            size = 2.6 if len(points) <= _FEW else 1.5
            parts += ['<circle cx="{}" cy="{}" r="{}"/>'.format(*at(x, y), size) for x, y in points]
        parts.append("</g>")
    parts.append("</g>")

    # Events, then what follows the pointer.
    for step, kind, text in chart.marks:
        if left <= step <= right:
            x = at(step, low)[0]
            line = f"M{x} {_TOP}V{_FOOT}" if kind == "resumed" else f"M{x} {_FOOT - 6}l3.5 6h-7z"
            parts.append(f'<path class="{kind}" d="{line}"><title>{escape(text)}</title></path>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_FOOT}H{_RIGHT}"/><g class="cursor"></g>')

    # The figure: title, legend, drawing, and the newest values, which the script replaces.
    newest = " · ".join(f"{curve.name} {shown(points[-1][1])}" for curve, points in curves)
    legend = "".join(f'<span class="key c{c.colour % 8} {c.kind}">{escape(c.name)}</span>' for c, _ in curves)
    marked = dict.fromkeys(kind for _, kind, _ in chart.marks)
    legend += "".join(f'<span class="key {kind}">{kind}</span>' for kind in marked)
    label = escape(f"{chart.title}, {chart.unit}, over steps {left:,.0f} to {right:,.0f}. Newest: {newest}")
    figure = (
        f'<figure class="chart" data-chart="{key}"><figcaption><b>{escape(chart.title)}</b> <i>{escape(chart.unit)}</i>'
        f'</figcaption><p class="legend">{legend}</p><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{label}">{"".join(parts)}</svg><output>step {max(xs):,.0f} · {escape(newest)}</output></figure>'
    )
    places = {"x": [left, right], "y": [low, high], "box": [_LEFT, _RIGHT, _TOP, _FOOT]}
    named = [{"name": curve.name, "colour": curve.colour % 8, "points": points} for curve, points in curves]
    return figure, {**places, "curves": named}


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Return round numbers from ``low`` to ``high``, about ``count`` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if m * power >= 0.999 * raw)
    step = max(step, 1.0) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    value = round(value, 12)
    small = 0 < abs(value) < 1e-3
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}".replace("e-0", "e-") if small else f"{value:.6g}"
