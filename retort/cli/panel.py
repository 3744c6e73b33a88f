"""What the user sees while a run goes on: lines, and on a terminal a live panel below them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from retort.cli.terminal import silent_control_keys
from retort.metrics_file import Metrics

WIDTH = 100
"""Of the panel, in columns, where the terminal is no narrower."""


STOPPING = "stopping"
"""The phase of a run from the user's wish to stop until it has."""
ACCURACY = "avg@n"
ROWS = ("reward", ACCURACY, "speed", "weight sync", "waited for rollouts", "step time", "version", "left")
"""Figures of the panel, which keeps the place of those that are not known yet."""
FORMATS = (
    ("reward", "critic/score/mean", "{:.3f}"),
    ("speed", "perf/throughput", "{:,.0f} tokens/s"),
    ("weight sync", "timing_s/weight_sync", "{:.2f} s"),
    ("waited for rollouts", "timing_s/wait_groups", "{:.2f} s"),
)
"""(figure, its metric, how it is shown)"""
METRICS = {"time", "policy_version", "timing_s/step", "timing_s/validation", *(name for _, name, _ in FORMATS)}


@dataclass(frozen=True)
class View:
    """One look at a run."""

    run: str
    steps: int
    step: int = 0
    phase: str = "starting"
    policy_version: int = 0
    waiting_for: str = ""
    waiting_s: float = 0.0
    last_step: Metrics = field(default_factory=dict)
    """Metrics of the last training step; empty before the first."""
    samples: int = 16
    accuracy: Sequence[tuple[int, float]] = ()
    """(policy version, avg@samples) of the validations so far."""
    seconds_left: float | None = None
    services: Sequence[tuple[str, str, int]] = ()
    """(name, state, restarts)"""


def is_shown(metric: str) -> bool:
    """Whether lines or panel show this metric of a step: what a launcher remembers of each."""
    return metric in METRICS or metric.startswith("val-core/")


class Screen:
    """Prints lines; shows the newest view below them if the output is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._shown = ExitStack()
        self._is_shown = False

    @property
    def live(self) -> bool:
        """Whether there is a panel, so that a line per step would be too much."""
        return self._live is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, view: View) -> None:
        if self._live:
            if not self._is_shown:
                self._shown.enter_context(silent_control_keys(self._console.file))
                self._shown.enter_context(self._live)
                self._is_shown = True
            self._live.update(panel(view, min(WIDTH, self._console.width)), refresh=True)

    def close(self) -> None:
        self._shown.close()
        self._is_shown = False


def step_line(line: Metrics, view: View) -> str:
    """One training step as plain text."""
    parts = [
        f"step {int(line['step'])}/{view.steps}",
        *(f"{name} {value}" for name, value in _figures(line, view)),
    ]
    return "  ".join(parts)


def validation_line(version: int, value: float, before: float, samples: int) -> str:
    if version == 0:
        return f"validation before training: avg@{samples} {value:.3f}"
    return f"validation of version {version}: avg@{samples} {value:.3f} ({value - before:+.3f} since the start)"


def panel(view: View, width: int) -> Panel:
    """The live panel, of the same size whatever there is to show."""
    table = Table.grid(padding=(0, 2))
    table.add_row("step", _one_line(f"{view.step} of {view.steps}, {view.phase}"))
    table.add_row("", ProgressBar(total=view.steps, completed=view.step, width=40))
    figures = dict(_figures(view.last_step, view))
    waiting = f"trainer waits for {view.waiting_for} ({view.waiting_s:.0f} s)" if view.waiting_for else ""
    # What is not as it should be comes first, where the line is cut last.
    services = sorted(view.services, key=lambda service: (service[1] == "running", -service[2]))
    for name in (f"avg@{view.samples}" if name == ACCURACY else name for name in ROWS):
        table.add_row(name, _one_line(figures.get(name, "-")))
    table.add_row("waiting", _one_line(waiting or "-"))
    table.add_row("services", _one_line(", ".join(_service(*service) for service in services)))
    return Panel(table, title=f"retort run {view.run}", title_align="left", width=width)


def _one_line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def clock(seconds: float) -> str:
    """`1:05`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(line: Metrics, view: View) -> list[tuple[str, str]]:
    """The figures of a step, with units. A figure that was not measured is left out."""
    figures = [(name, text.format(line[key])) for name, key, text in FORMATS if key in line]
    if view.accuracy:
        version, value = view.accuracy[-1]
        figures.insert(1, (f"avg@{view.samples}", f"{value:.3f} (version {version})"))
    if "timing_s/step" in line:
        validation = line.get("timing_s/validation", 0.0)
        besides = f" and {validation:.1f} s of validation" if validation else ""
        figures.append(("step time", f"{line['timing_s/step'] - validation:.1f} s{besides}"))
    figures.append(("version", f"{int(line.get('policy_version', view.policy_version))}"))
    if view.seconds_left is not None and view.phase != STOPPING:
        figures.append(("left", clock(view.seconds_left)))
    return figures


def _service(name: str, state: str, restarts: int) -> str:
    return f"{name} {state}" + (f" (restarts: {restarts})" if restarts else "")
