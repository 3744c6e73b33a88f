"""How a run went, from its metrics.jsonl: what the model card puts into its tables and its curve."""

from collections.abc import Mapping
from pathlib import Path

from retort.metrics_file import Metrics, read_metrics

Curve = list[tuple[int, float]]
SCORES = ("critic/score/mean", "critic/rewards/mean")


class Results:
    """Validation metrics over all questions, under the names avg@n, best@n and maj@n, and the training score."""

    def __init__(self, metrics_file: Path, questions_by_source: Mapping[str, int], samples: int) -> None:
        """`samples` is n; a file that is not there is a run without results."""
        self._lines = read_metrics(metrics_file, lambda name: name in SCORES or name.startswith("val-core/"))
        self._questions = questions_by_source
        n = samples
        self._logged = {f"avg@{n}": f"mean@{n}", f"best@{n}": f"best@{n}/mean", f"maj@{n}": f"maj@{n}/mean"}
        self.names = list(self._logged)
        self.last_step = int(self._lines[-1]["step"]) if self._lines else 0
        self.curves = {name: curve for name in self.names if (curve := self._curve(name))}

    def at(self, step: int) -> list[float | None]:
        """The validation metrics of a step, in the order of `names`; None where nobody measured."""
        return [dict(self.curves.get(name, [])).get(step) for name in self.names]

    def validations(self) -> list[tuple[int, list[float | None], float | None]]:
        """(step, its validation metrics, its training score) of every step that was validated."""
        scores = {int(line["step"]): line.get("critic/score/mean") for line in self._lines}
        return [(step, self.at(step), scores[step]) for step, _ in self.curves.get(self.names[0], [])]

    def summary(self) -> list[tuple[str, float, int]]:
        """(name, value, step): the final training score, and of every metric the untrained, final and peak value."""
        last = self._lines[-1] if self._lines else {}
        rows = [(f"Final {name}", last[name], int(last["step"])) for name in SCORES if name in last]
        for name, curve in self.curves.items():
            untrained = [(step, value) for step, value in curve if step == 0]
            trained = [(step, value) for step, value in curve if step > 0]
            peak = [max(trained, key=lambda point: point[1])] if trained else []
            for role, points in (("Untrained", untrained), ("Final", trained[-1:]), ("Peak", peak)):
                rows += [(f"{role} validation {name}", value, step) for step, value in points]
        return rows

    def _curve(self, name: str) -> Curve:
        values = [(int(line["step"]), self._over_all_questions(line, name)) for line in self._lines]
        return [(step, value) for step, value in values if value is not None]

    def _over_all_questions(self, line: Metrics, name: str) -> float | None:
        """Each metric is a mean over the questions of a data source, so sources count by their questions."""
        total = 0.0
        for source, count in self._questions.items():
            value = line.get(f"val-core/{source}/acc/{self._logged[name]}")
            if value is None:
                return None
            total += count * value
        return total / sum(self._questions.values())
