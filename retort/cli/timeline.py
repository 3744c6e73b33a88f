"""`retort timeline [RUN_DIR]`: who did what when, as a file for ui.perfetto.dev or chrome://tracing."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from retort.cli.report.run_files import Span
from retort.cli.status import newest_run
from retort.cli.trace import Group, whole_lines
from retort.config import ConfigError
from retort.disk import writing

EPILOG = """\
A track for each part of the trainer's steps, one for each replica with the groups that it sampled, and one for the
reward service. Open the file at https://ui.perfetto.dev, which reads it in the browser and sends it nowhere. Reads the
run's own files, while it goes on or after. Clocks of several hosts are taken as they are.
"""
TRAINER, REWARD, FIRST_REPLICA = 1, 2, 3
Event = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dir", nargs="?", type=Path, help="directory of the run; default: the newest under runs/")
    parser.add_argument("--step", type=int, help="this step alone; default: all")
    parser.add_argument("-o", "--output", type=Path, help="default: RUN_DIR/timeline.json")


def main(args: argparse.Namespace) -> int:
    directory = args.run_dir or newest_run(Path("runs"))
    output = args.output or directory / "timeline.json"
    events = timeline_events(directory, args.step)
    if not events:
        wanted = "has finished no part of a step yet" if args.step is None else f"has nothing of step {args.step}"
        raise ConfigError(f"{directory} {wanted}: its timeline.jsonl says nothing about it.")
    with writing(output):
        output.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    print(f"{output}: {len(events)} events. Open it at https://ui.perfetto.dev")
    return 0


def timeline_events(directory: Path, step: int | None = None) -> list[Event]:
    """Events in Chrome's trace format, which Perfetto reads: times in microseconds since the first."""
    spans = [span for span in _spans(directory) if step in (None, span.step)]
    groups = [group for group in _groups(directory) if step in (None, group.step) and group.began]
    replicas = sorted({group.sampled_by for group in groups})
    ids = {name: number for number, name in enumerate(replicas, start=FIRST_REPLICA)}
    events = [_of_trainer(span) for span in spans]
    for group in groups:
        events += _of_group(group, ids[group.sampled_by])
    if not events:
        return []
    zero = min(event["ts"] for event in events)
    names = {TRAINER: "trainer", REWARD: "reward", **{number: name for name, number in ids.items()}}
    return [
        *({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for pid, name in names.items()),
        *({**event, "ts": round(event["ts"] - zero)} for event in sorted(events, key=lambda event: event["ts"])),
    ]


def _spans(directory: Path) -> Iterator[Span]:
    for line in whole_lines(directory / "timeline.jsonl"):
        yield msgspec.json.decode(line, type=Span)


def _groups(directory: Path) -> Iterator[Group]:
    for folder in ("rollouts", "validation"):
        for file in sorted((directory / folder).glob("step-*.jsonl")):
            for line in whole_lines(file):
                yield msgspec.json.decode(line, type=Group)


def _of_trainer(span: Span) -> Event:
    """Parts of a step follow each other, so one track shows them all."""
    complete = {"ph": "X", "name": span.part, "pid": TRAINER, "tid": 0}
    return {**complete, "ts": 1e6 * span.start, "dur": round(1e6 * span.seconds), "args": {"step": span.step}}


def _of_group(group: Group, replica: int) -> list[Event]:
    """Groups are sampled and scored at the same time as others, which asynchronous events may be."""
    sampled = group.began + group.generate_seconds
    versions = sorted({version for sample in group.rollouts for version in sample.policy_versions})
    rewards = [sample.reward for sample in group.rollouts]
    details = {"step": group.step, "policy_versions": versions, "rewards": rewards, "question": group.data_index}
    return [
        *_asynchronous(group.group_id, "sample", replica, group.began, sampled, details),
        *_asynchronous(group.group_id, "score", REWARD, sampled, sampled + group.score_seconds, details),
    ]


def _asynchronous(
    group_id: str, category: str, pid: int, start: float, end: float, details: dict[str, Any]
) -> list[Event]:
    event = {"name": group_id, "cat": category, "id": group_id, "pid": pid, "tid": 0}
    return [{**event, "ph": "b", "ts": 1e6 * start, "args": details}, {**event, "ph": "e", "ts": 1e6 * end}]
