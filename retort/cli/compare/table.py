"""Two sides as a table: the last and the best value of each metric, and the difference."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from retort.cli.report.charts import number
from retort.cli.report.curves import CURVES

VALIDATION = re.compile(r"val-core/.+/acc/(mean@\d+|best@\d+/mean|maj@\d+/mean)")
TRAINING = ("critic/score/mean", "critic/rewards/mean")


@dataclass(frozen=True)
class Measured:
    """A run, or what was published of one."""

    name: str
    metrics: Sequence[Mapping[str, float]]
    """One mapping a step, ascending, with the key `step`."""

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric is known."""
        return [(line["step"], line[metric]) for line in self.metrics if metric in line]


@dataclass(frozen=True)
class Row:
    """One metric on both sides; a side that does not have it is None."""

    metric: str
    which: str
    """`final` or `peak`."""
    left: tuple[float, float] | None
    """(step, value)"""
    right: tuple[float, float] | None

    @property
    def difference(self) -> float | None:
        return self.right[1] - self.left[1] if self.left and self.right else None


def compared_metrics(*sides: Measured) -> list[str]:
    """What any of them has of: validation, rewards, and what the report shows as curves."""
    known = {metric for side in sides for line in side.metrics for metric in line}
    curves = [metric for curve in CURVES for metric, _ in curve.metrics]
    validation = sorted(filter(VALIDATION.fullmatch, known), key=lambda metric: ("mean@" not in metric, metric))
    return [*validation, *(metric for metric in (*TRAINING, *curves) if metric in known)]


def rows(left: Measured, right: Measured, metrics: Iterable[str]) -> Iterator[Row]:
    """The last value of every metric; of rewards and validation the largest besides."""
    for metric in metrics:
        ours, theirs = left.points(metric), right.points(metric)
        yield Row(metric, "final", *(points[-1] if points else None for points in (ours, theirs)))
        if has_peak(metric):
            yield Row(metric, "peak", _peak(ours), _peak(theirs))


def has_peak(metric: str) -> bool:
    """Whether more is better."""
    return metric in TRAINING or VALIDATION.fullmatch(metric) is not None


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first two columns are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def value_text(point: tuple[float, float] | None) -> str:
    return f"{_short(point[1])} @{point[0]:g}" if point else "-"


def difference_text(difference: float | None) -> str:
    return "" if difference is None else ("+" if difference >= 0 else "-") + _short(abs(difference))


def _peak(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    return max(points, key=lambda point: point[1], default=None)


def _short(value: float) -> str:
    return f"{value:.4f}" if 0.01 <= abs(value) < 10 or value == 0 else number(value)
