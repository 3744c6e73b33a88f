"""Charts as inline SVG that needs no script: lines, stacked bars, and a strip of questions.

The SVG is stretched to its box while the labels around it are HTML, so text keeps its size on every screen. What a
pointer or an arrow key shows travels with the chart in `data-hover`, as text that was formatted here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

MAX_POINTS = 400
HEIGHT = 1000
"""The drawing's own units, in both directions."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    points: Points
    """(step, value), ascending."""
    colour: int
    """1 to 9, a class of the style sheet; 0 is none."""
    look: str = "line"
    """`line`; `dots` for a value that exists at few steps; `faint` for the noise behind a mean."""


def line_chart(
    series: Sequence[Series], *, unit: bool = False, zero: bool = True, mark: tuple[float, str] | None = None
) -> str:
    """Lines over training steps. `unit` fixes the axis to 0..1, `zero` includes 0, `mark` is a labelled level."""
    series = [Series(s.label, thin(s.points), s.colour, s.look) for s in series]
    steps = sorted({step for s in series for step, _ in s.points})
    values = [value for s in series for _, value in s.points]
    low, high = (0.0, 1.0) if unit else (min(values), max(values))
    ticks = nice_ticks(min(low, 0.0) if zero else low, high)
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return HEIGHT * (step - first) / (last - first)

    def y(value: float) -> float:
        return HEIGHT * (1 - (value - ticks[0]) / (ticks[-1] - ticks[0]))

    drawing = [f'<path class="grid" d="{"".join(f"M0 {y(tick):.0f}H{HEIGHT}" for tick in ticks)}"/>']
    if mark:
        drawing.append(f'<path class="level" d="M0 {y(mark[0]):.0f}H{HEIGHT}"/>')
    for s in series:
        drawing.append(_line(s, [(x(step), y(value)) for step, value in s.points]))
    labels = [_y_label(tick, y(tick)) for tick in ticks]
    labels += [_x_label(f"{step:,.0f}", x(step)) for step in _step_ticks(first, last)]
    if mark:
        labels.append(f'<span class="level-label" style="top:{y(mark[0]) / 10:.1f}%">{escape(mark[1])}</span>')
    return _plot(drawing, labels, _hover(steps, [x(step) / HEIGHT for step in steps], series))


def bar_chart(parts: Mapping[str, Points], colours: Mapping[str, int]) -> str:
    """Stacked bars, one per step; a part that a step lacks counts as 0."""
    steps = sorted({step for points in parts.values() for step, _ in points})
    nothing = dict.fromkeys(steps, 0.0)
    stack = {label: dict(thin([*(nothing | dict(points)).items()])) for label, points in parts.items()}
    steps = [*next(iter(stack.values()))]
    totals = {step: sum(values[step] for values in stack.values()) for step in steps}
    ticks = nice_ticks(0.0, max(totals.values()))
    width = HEIGHT / len(steps)

    def y(value: float) -> float:
        return HEIGHT * (1 - value / ticks[-1])

    drawing = [f'<path class="grid" d="{"".join(f"M0 {y(tick):.0f}H{HEIGHT}" for tick in ticks)}"/>']
    base = dict.fromkeys(steps, 0.0)
    for label, values in stack.items():
        path = ""
        for index, step in enumerate(steps):
            left, right, bottom = (index + 0.12) * width, (index + 0.88) * width, base[step]
            base[step] += values[step]
            path += f"M{left:.1f} {y(bottom):.1f}H{right:.1f}V{y(base[step]):.1f}H{left:.1f}z"
        drawing.append(f'<path class="bar s{colours[label]}" d="{path}"/>')
    labels = [_y_label(tick, y(tick)) for tick in ticks]
    shown = set(_step_ticks(steps[0], steps[-1]))
    labels += [_x_label(f"{s:,.0f}", (i + 0.5) * width) for i, s in enumerate(steps) if s in shown]
    series = [Series(label, [*values.items()], colours[label]) for label, values in stack.items()]
    at = [(index + 0.5) / len(steps) for index in range(len(steps))]
    return _plot(drawing, labels, _hover(steps, at, [*series, Series("together", [*totals.items()], 0)]))


def thin(points: Points) -> Points:
    """At most MAX_POINTS points; a long run is drawn as means over equally many neighbouring steps."""
    bucket = math.ceil(len(points) / MAX_POINTS)
    if bucket <= 1:
        return points
    buckets = [points[i : i + bucket] for i in range(0, len(points), bucket)]
    return [(b[-1][0], sum(value for _, value in b) / len(b)) for b in buckets]


def running_mean(points: Points, width: int) -> Points:
    """Mean of each value and of up to width - 1 before it."""
    values = [value for _, value in points]
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose low..high."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    unit = next(step * magnitude for step in (1, 2, 2.5, 5, 10) if step * magnitude >= rough * 0.999)
    start, end = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [index * unit for index in range(start, end + 1)]


def number(value: float) -> str:
    """A value as short as its reader needs it."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}".removesuffix(".0")
    if size >= 0.1:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if size == 0 or size >= 0.001:
        return f"{value:.3g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _line(series: Series, spots: Points) -> str:
    trace = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    line = f'<path class="{series.look} s{series.colour}" d="{trace}"/>'
    if series.look == "dots" or len(spots) == 1:
        # A line without length has round ends and nothing between: a dot that no stretching deforms.
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in spots)
        line += f'<path class="dot s{series.colour}" d="{dots}"/>'
    return line


def _step_ticks(first: float, last: float) -> list[float]:
    ticks = [tick for tick in nice_ticks(first, last) if first < tick < last and tick == int(tick)]
    near = (last - first) / 12
    return [first, *[tick for tick in ticks if tick - first > near and last - tick > near], last]


def _y_label(value: float, y: float) -> str:
    return f'<span class="y" style="top:{y / 10:.1f}%">{number(value)}</span>'


def _x_label(text: str, x: float) -> str:
    return f'<span class="x" style="left:{x / 10:.1f}%">{text}</span>'


def _hover(steps: Sequence[float], at: Sequence[float], series: Sequence[Series]) -> str:
    """`at`: where each step is, 0..1; `series`: [label, colour, one text a step]."""
    columns = []
    for s in series:
        values = dict(s.points)
        columns.append([s.label, s.colour, [number(values[step]) if step in values else "" for step in steps]])
    return json.dumps({"x": [f"{step:,.0f}" for step in steps], "at": [round(a, 4) for a in at], "series": columns})


def _plot(drawing: Sequence[str], labels: Sequence[str], hover: str) -> str:
    svg = f'<svg viewBox="0 0 {HEIGHT} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{"".join(drawing)}</svg>'
    return f'<div class="plot" tabindex="0" role="group" data-hover="{escape(hover)}">{svg}{"".join(labels)}</div>'
