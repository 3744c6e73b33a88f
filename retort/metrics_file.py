"""What a run's metrics.jsonl says so far, read as it grows: by the panel, the report, the model card, the trackers."""

import json
import math
import re
import sys
from collections.abc import Callable, ItemsView, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

Metrics = dict[str, float]
_RECENT_STEPS = 10


def everything(_: str) -> bool:
    """Keep every metric of a step."""
    return True


class MetricsFile:
    """The lines of one metrics file, by step. A trainer that resumes cuts the file back to its checkpoint."""

    def __init__(self, path: Path, keep: Callable[[str], bool] = everything) -> None:
        """`keep` says by its name which metric is remembered: a step has a hundred, and a run thousands of steps."""
        self._path = path
        self._keep = keep
        self._offset = 0
        self.by_step: dict[int, Metrics] = {}

    def read(self) -> list[Metrics]:
        """The whole lines that were appended since the last call."""
        return list(self.stream())

    def stream(self) -> Iterator[Metrics]:
        """The same, one after the other."""
        if not self._path.exists():
            return
        known: dict[int, Metrics] = {}
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:  # cut back: what is still there was read before and is not new
                known, self.by_step, self._offset = self.by_step, {}, 0
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return  # it is being written
                self._offset += len(text)
                line = _numbers(text)
                if "step" in line and not self._remember(line) <= known.get(int(line["step"]), {}).items():
                    yield line

    def _remember(self, line: Metrics) -> ItemsView[str, float]:
        """Keep what is to be kept of a line; answers what of that is as the line says."""
        step, stands_apart = int(line["step"]), is_validation(line)
        # Each line comes with strings of its own, which are longer than the numbers.
        kept = {sys.intern(name): value for name, value in line.items() if name == "step" or self._keep(name)}
        # The validation of a step may come later, on a line of its own; the step's time stays.
        before = self.by_step.get(step, {}) if stands_apart else {}
        self.by_step[step] = {**kept, **before}
        return {name: value for name, value in kept.items() if name != "time" or not stands_apart}.items()

    def accuracy(self, samples: int) -> list[tuple[int, float]]:
        """(policy version, avg@samples) of every validation so far, in order of version."""
        values = ((step, accuracy(line, samples)) for step, line in sorted(self.by_step.items()))
        return [(step, value) for step, value in values if value is not None]

    def seconds_left(self, steps: int) -> float | None:
        """How long the steps that remain take at the median pace of the last ten; None before two are done."""
        recent = sorted(step for step in self.by_step if step > 0)[-_RECENT_STEPS:]
        if len(recent) < 2:
            return None
        times = [self.by_step[step]["time"] for step in recent]
        # The median, because a pause between two launches of a run lies between two steps.
        return median(after - before for before, after in pairwise(times)) * (steps - recent[-1])


def read_metrics(path: Path, keep: Callable[[str], bool] = everything) -> list[Metrics]:
    """One mapping a step, ascending: finite numbers only, the validation of a step with the rest of it."""
    file = MetricsFile(path, keep)
    for _ in file.stream():
        pass
    return [file.by_step[step] for step in sorted(file.by_step)]


def validation_scores(directory: Path, samples: int) -> dict[int, float]:
    """avg@samples of each policy version of the run in `directory` that was validated."""
    file = MetricsFile(directory / "metrics.jsonl")
    file.read()
    return dict(file.accuracy(samples))


def _numbers(text: bytes) -> Metrics:
    """The finite numbers of a line; none of one that is damaged."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return {name: value for name, value in line.items() if isinstance(value, int | float) and math.isfinite(value)}


def is_validation(line: Metrics) -> bool:
    """Whether the line holds nothing but the validation of a step that has a line already."""
    measured = line.keys() - {"step", "time", "policy_version"}
    return line["step"] > 0 and bool(measured) and all(name.startswith("val-") for name in measured)


def accuracy(line: Metrics, samples: int) -> float | None:
    """avg@samples of a validation, the mean over data sources; None if the line holds no validation."""
    name = re.compile(rf"val-core/.+/acc/mean@{samples}")
    values = [value for key, value in line.items() if name.fullmatch(key)]
    return sum(values) / len(values) if values else None
