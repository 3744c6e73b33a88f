"""What a session of chaos did and saw, in figures: printed at its end, whether it passed or not."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos.faults import Chaos


@dataclass
class Tally:
    """Sums over all runs of a session."""

    runs: int = 0
    identical: int = 0
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kind, what the trainer was doing) -> how often."""
    recovered_s: dict[str, list[float]] = field(default_factory=dict)
    accepted_calls: int = 0
    diagnoses: int = 0
    wrong_diagnoses: list[str] = field(default_factory=list)
    zombies: Counter[str] = field(default_factory=Counter)
    """Trainers that were replaced while frozen, by what they were doing; each ended fenced."""
    boundaries: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Who was killed -> at how many boundaries, of how many."""

    def add(self, chaos: Chaos) -> None:
        self.runs += 1
        self.faults.update((hit.kind, hit.state) for hit in chaos.hits)
        self.accepted_calls += len(chaos.run.accepted_epochs())
        self.diagnoses += chaos.diagnoses
        self.wrong_diagnoses += chaos.wrong_diagnoses
        for name, seconds in chaos.recovered_s.items():
            self.recovered_s.setdefault(name, []).extend(seconds)

    def lines(self) -> Iterator[str]:
        """The table."""
        yield f"{self.runs} runs with {self.faults.total()} faults, {self.identical} ended with the undisturbed bits"
        yield f"{self.accepted_calls} accepted trainer calls were read back, epochs never fell"
        wrong = len(self.wrong_diagnoses)
        yield f"the doctor was asked {self.diagnoses} times who was down, and was wrong {wrong} times"
        yield from self.wrong_diagnoses
        for kind in sorted({kind for kind, _ in self.faults}):
            states = {state: count for (one, state), count in self.faults.items() if one == kind}
            shown = ", ".join(f"{state} {count}" for state, count in sorted(states.items()))
            yield f"  {kind:<18} {sum(states.values()):>4}  ({shown})"
        for name, seconds in sorted(self.recovered_s.items()):
            half, most = _percentile(seconds, 0.5), _percentile(seconds, 0.95)
            yield f"  {name} was back after {half:.1f} s (half), {most:.1f} s (95 %), {len(seconds)} times"
        if self.zombies:
            shown = ", ".join(f"{state} {count}" for state, count in self.zombies.items())
            yield f"{self.zombies.total()} trainers were frozen and replaced, and each was refused ({shown})"
        for who, (swept, boundaries) in self.boundaries.items():
            yield f"killed at {swept} of the {who}'s {boundaries} operation boundaries"


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
