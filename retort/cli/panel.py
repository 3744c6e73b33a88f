"""What the user sees while a run goes on: lines, and on a terminal a live panel below them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from retort.cli.metrics_tail import Metrics


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


class Screen:
    """Prints lines; shows the newest view below them if the output is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._shown = False

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
            if not self._shown:
                self._live.start()
                self._shown = True
            self._live.update(panel(view), refresh=True)

    def close(self) -> None:
        if self._live and self._shown:
            self._live.stop()
            self._shown = False


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


def panel(view: View) -> Panel:
    """The live panel."""
    table = Table.grid(padding=(0, 2))
    table.add_row("step", f"{view.step} of {view.steps}, {view.phase}")
    table.add_row("", ProgressBar(total=view.steps, completed=view.step, width=40))
    for name, value in _figures(view.last_step, view):
        table.add_row(name, value)
    if view.waiting_for:
        table.add_row("waiting", f"trainer waits for {view.waiting_for} ({view.waiting_s:.0f} s)")
    table.add_row("services", ", ".join(_service(*service) for service in view.services))
    return Panel(table, title=f"retort run {view.run}", title_align="left", expand=False)


def clock(seconds: float) -> str:
    """`1:05`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(line: Metrics, view: View) -> list[tuple[str, str]]:
    """The figures of a step, with units. A figure that was not measured is left out."""
    formats = [
        ("reward", "critic/score/mean", "{:.3f}"),
        ("speed", "perf/throughput", "{:,.0f} tokens/s"),
        ("weight sync", "timing_s/weight_sync", "{:.2f} s"),
        ("waited for rollouts", "timing_s/wait_groups", "{:.2f} s"),
        ("step time", "timing_s/step", "{:.1f} s"),
    ]
    figures = [(name, text.format(line[key])) for name, key, text in formats if key in line]
    if view.accuracy:
        version, value = view.accuracy[-1]
        figures.insert(1, (f"avg@{view.samples}", f"{value:.3f} (version {version})"))
    figures.append(("version", f"{int(line.get('policy_version', view.policy_version))}"))
    if view.seconds_left is not None:
        figures.append(("left", clock(view.seconds_left)))
    return figures


def _service(name: str, state: str, restarts: int) -> str:
    return f"{name} {state}" + (f" (restarts: {restarts})" if restarts else "")
