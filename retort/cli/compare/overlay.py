"""Two sides as one self-contained page: a chart for each metric with both curves."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from retort.cli.compare.table import Measured, Row, difference_text, has_peak, value_text
from retort.cli.report.charts import Series, line_chart, number

LEFT_COLOUR, RIGHT_COLOUR = 1, 2


def render(left: Measured, right: Measured, rows: Sequence[Row]) -> str:
    """The page. `rows` is the table, and its metrics are what is drawn."""
    script = _asset("retort.cli.report", "page.js")
    figures = "".join(_figure(metric, left, right) for metric in dict.fromkeys(row.metric for row in rows))
    return Template(_asset("retort.cli.compare", "overlay.html")).substitute(
        script=script,
        # Names come from files of others. Should an escape ever be missing, the browser still runs only this script.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=_asset("retort.cli.report", "page.css"),
        left=escape(left.name),
        right=escape(right.name),
        rows="".join(_row(row) for row in rows),
        figures=figures or '<p class="empty">Neither has logged anything yet.</p>',
    )


def _row(row: Row) -> str:
    numbers = (value_text(row.left), value_text(row.right), difference_text(row.difference))
    return f"<tr><th>{escape(row.metric)}, {row.which}</th>{''.join(f'<td>{n}</td>' for n in numbers)}</tr>"


def _figure(metric: str, left: Measured, right: Measured) -> str:
    sides = [(left, LEFT_COLOUR), (right, RIGHT_COLOUR)]
    drawn = [(side.name, points, colour) for side, colour in sides if (points := side.points(metric))]
    look = "dots" if metric.startswith("val-") else "line"
    series = [Series(name, points, colour, look) for name, points, colour in drawn]
    unit = has_peak(metric) and all(0 <= value <= 1 for _, points, _ in drawn for _, value in points)
    legend = "".join(
        f'<li><i class="key s{colour}"></i>{escape(name)} <b>{number(points[-1][1])}</b></li>'
        for name, points, colour in drawn
    )
    return (
        f"<figure><figcaption><h3>{escape(metric)}</h3></figcaption>{line_chart(series, unit=unit)}"
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _asset(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
