"""Who worked and who waited, against the clock: a lane for each part of a step, and what the logs say beside them."""

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from retort.cli.bottleneck import bottleneck
from retort.cli.report.charts import HEIGHT, nice_ticks, number
from retort.cli.report.run_files import Run, Span

LANES = (
    ("checkpoint", "saving", "trainer", 7),
    ("wait_replica", "waiting for a replica", "rollout", 8),
    ("wait_groups", "waiting for rollouts", "rollout", 2),
    ("old_logprobs", "old log-probs", "trainer", 3),
    ("teacher", "teacher", "trainer", 4),
    ("update", "updates", "trainer", 1),
    ("weight_sync", "weight sync", "both", 5),
    ("validation", "validation", "rollout", 6),
)
"""(part, label, which service works, colour), in the order of a step."""
LAST_STEPS = 8
MAX_EVENTS = 200
MAX_SPANS = 10_000
"""Of a longer run the last; a page must stay small."""
LIFE = {"took_over", "resumed", "ready", "engine_loaded", "draining", "stopped", "ended"}
"""Events that are shown although they are no warnings."""
EVENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d{3} ([A-Z]+) (\S+) (\w+)(?: (.*))?")


@dataclass(frozen=True)
class Event:
    """A line of a log that a reader of the timeline should see."""

    at: float
    """Seconds since 1970."""
    level: str
    service: str
    name: str
    fields: str

    @property
    def is_bad(self) -> bool:
        return self.level != "INFO"


def timeline(run: Run) -> str:
    spans = {name: [span for span in run.spans[-MAX_SPANS:] if span.part == name] for name, *_ in LANES}
    events = read_events(run.directory / "logs")
    if not any(spans.values()):
        return f'<p class="empty">The trainer has not finished any part of a step yet.</p>{_table(events, None)}'
    first = min(span.start for lane in spans.values() for span in lane)
    parts = [_figure("The whole run", spans, events, first)]
    steps = sorted({span.step for lane in spans.values() for span in lane})
    if len(steps) > LAST_STEPS:
        recent = {name: [s for s in lane if s.step > steps[-LAST_STEPS - 1]] for name, lane in spans.items()}
        parts.append(_figure(f"The last {LAST_STEPS} steps", recent, events, first))
    said = escape(bottleneck(run.metrics))
    lead = f'<p class="lead">{said}</p>' if said else ""
    return f'{lead}<div class="figures">{"".join(parts)}</div>{_table(events, first)}'


def read_events(logs: Path) -> list[Event]:
    """The last MAX_EVENTS notable ones of all services, in the order of time."""
    found = [event for file in sorted(logs.glob("*.log")) for event in _events_of(file)]
    notable = [event for event in found if event.is_bad or event.name in LIFE]
    return sorted(notable, key=lambda event: event.at)[-MAX_EVENTS:]


def _events_of(file: Path) -> Iterator[Event]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := EVENT.fullmatch(line):
            moment, level, service, name, fields = match.groups()
            at = time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
            yield Event(at, level, service, name, fields or "")


def _figure(title: str, spans: Mapping[str, Sequence[Span]], events: Sequence[Event], zero: float) -> str:
    everything = [span for lane in spans.values() for span in lane]
    first, last = min(span.start for span in everything), max(span.end for span in everything)
    shown = [lane for lane in LANES if spans[lane[0]]]
    height = HEIGHT / len(shown)

    def x(at: float) -> float:
        return HEIGHT * (at - first) / max(last - first, 1e-9)

    drawing, labels = [], []
    for row, (name, label, who, colour) in enumerate(shown):
        top, bottom = (row + 0.18) * height, (row + 0.82) * height
        boxes = "".join(
            f"M{x(s.start):.1f} {top:.0f}H{max(x(s.end), x(s.start) + 0.7):.1f}V{bottom:.0f}H{x(s.start):.1f}z"
            for s in spans[name]
        )
        drawing.append(f'<path class="bar s{colour}" d="{boxes}"/>')
        share = sum(s.end - s.start for s in spans[name]) / max(last - first, 1e-9)
        labels.append(
            f'<span class="y" style="top:{(top + bottom) / 20:.1f}%">{escape(label)} <b>{share:.0%}</b>'
            f"<small>{who}</small></span>"
        )
    bad = "".join(f"M{x(event.at):.1f} 0V{HEIGHT}" for event in events if event.is_bad and first <= event.at <= last)
    drawing.append(f'<path class="event" d="{bad}"/>')
    for minute in nice_ticks((first - zero) / 60, (last - zero) / 60):
        if 0 <= x(zero + 60 * minute) <= HEIGHT:
            labels.append(f'<span class="x" style="left:{x(zero + 60 * minute) / 10:.1f}%">{minute:g} min</span>')
    svg = f'<svg viewBox="0 0 {HEIGHT} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{"".join(drawing)}</svg>'
    hover = escape(_hover(spans, shown, x))
    return (
        f'<figure class="wide"><figcaption><h3>{escape(title)}</h3><span>{number(last - first)} s</span></figcaption>'
        f'<div class="plot lanes" tabindex="0" role="group" data-hover="{hover}">{svg}{"".join(labels)}</div>'
        '<p class="meaning">Each lane is a part of a step, under its name the service that works meanwhile. A dashed '
        "line is a warning or an error, listed below. Bad: waiting lanes that are fuller than the updates.</p></figure>"
    )


def _hover(
    spans: Mapping[str, Sequence[Span]], shown: Sequence[tuple[str, str, str, int]], x: Callable[[float], float]
) -> str:
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    lengths: defaultdict[tuple[str, int], float] = defaultdict(float)
    for span in (span for lane in spans.values() for span in lane):
        first[span.step] = min(first.get(span.step, span.start), span.start)
        last[span.step] = max(last.get(span.step, span.end), span.end)
        lengths[span.part, span.step] += span.seconds
    steps = sorted(first)
    series = [
        [label, colour, [f"{lengths[name, step]:.2f} s" if (name, step) in lengths else "" for step in steps]]
        for name, label, _, colour in shown
    ]
    at = [round(x((first[step] + last[step]) / 2) / HEIGHT, 4) for step in steps]
    return json.dumps({"x": [f"{step:,.0f}" for step in steps], "at": at, "series": series})


def _table(events: Sequence[Event], zero: float | None) -> str:
    if not events:
        return (
            '<section><h2>Events</h2><p class="empty">The logs of this run are not here, or say nothing.</p></section>'
        )
    rows = "".join(
        f"<tr{' class=bad' if event.is_bad else ''}><td>{_moment(event.at, zero)}</td><td>{escape(event.service)}</td>"
        f"<td>{'⚠ ' if event.is_bad else ''}{escape(event.name)}</td><td>{escape(event.fields[:300])}</td></tr>"
        for event in events
    )
    return (
        "<section><h2>Events</h2><p class=lead>Starts, ends, warnings and errors of every service, from its log.</p>"
        f"<table class=events><tr><th>when</th><th>service</th><th>event</th><th></th></tr>{rows}</table></section>"
    )


def _moment(at: float, zero: float | None) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(at))
    return clock if zero is None else f"{clock} <small>{(at - zero) / 60:.1f} min</small>"
