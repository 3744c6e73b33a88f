"""What a run's metrics.jsonl says so far, read as it grows: by the panel, the report, the model card, the trackers."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from statistics import median

Metrics = dict[str, float]
_RECENT_STEPS = 10


class MetricsFile:
    """The lines of one metrics file, by step. A trainer that resumes cuts the file back to its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.by_step: dict[int, Metrics] = {}

    def read(self) -> list[Metrics]:
        """The whole lines that were appended since the last call."""
        if not self._path.exists():
            return []
        known: dict[int, Metrics] = {}
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:  # cut back: what is still there was read before and is not new
                known, self.by_step, self._offset = self.by_step, {}, 0
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [line for line in map(_numbers, whole.splitlines()) if "step" in line]
        for line in lines:
            # The validation of a step may come later, on a line of its own; the step's time stays.
            step = int(line["step"])
            before = self.by_step.get(step, line) if is_validation(line) else {}
            self.by_step[step] = {**line, **before}
        # Of a step whose validation stands apart, what is known is both lines together, with the time of the first.
        return [line for line in lines if not _says(known.get(int(line["step"]), {}), line)]

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


def read_metrics(path: Path) -> list[Metrics]:
    """One mapping a step, ascending: finite numbers only, the validation of a step with the rest of it."""
    file = MetricsFile(path)
    file.read()
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


def _says(known: Metrics, line: Metrics) -> bool:
    told = {name: value for name, value in line.items() if name != "time" or not is_validation(line)}
    return told.items() <= known.items()


def is_validation(line: Metrics) -> bool:
    """Whether the line holds nothing but the validation of a step that has a line already."""
    measured = line.keys() - {"step", "time", "policy_version"}
    return line["step"] > 0 and bool(measured) and all(name.startswith("val-") for name in measured)


def accuracy(line: Metrics, samples: int) -> float | None:
    """avg@samples of a validation, the mean over data sources; None if the line holds no validation."""
    name = re.compile(rf"val-core/.+/acc/mean@{samples}")
    values = [value for key, value in line.items() if name.fullmatch(key)]
    return sum(values) / len(values) if values else None
