"""`retort trace GROUP_ID` and `retort trace --step N`: from a sample to its gradient to a policy version, and back."""

import argparse
import difflib
import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from retort.cli.bottleneck import bottleneck
from retort.config import ConfigError, load_config
from retort.metrics_file import read_metrics

EPILOG = """\
Reads the run's own files, while it goes on or after. `update` numbers the updates of a step from 1. A sample without a
gradient, for example one with advantage 0, counts in its update's denominator only. A validation group, such as
v10-000003, measured version 10 and made no update.
"""
UPDATE_METRICS = ("actor/pg_loss", "actor/grad_norm", "actor/updates_skipped")


class Sample(msgspec.Struct, frozen=True):
    """One completion, without its text."""

    policy_versions: list[int]
    finish_reason: str
    reward: float
    parsed: str
    advantage: float | None = None
    update: int | None = None
    """None in a validation, and in the files of an older retort."""
    has_gradient: bool | None = None


class _Name(msgspec.Struct, frozen=True):
    group_id: str


class Group(msgspec.Struct, frozen=True):
    """A line of rollouts/ or validation/."""

    group_id: str
    step: int
    data_index: int
    data_source: str
    question: str
    answer: str
    sampled_by: str
    generate_seconds: float
    score_seconds: float
    rollouts: list[Sample]
    began: float = 0.0
    """Unix time of the replica; 0 in the files of an older retort."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.usage = "retort trace GROUP_ID [RUN_DIR] [--json]\n       retort trace --step N [RUN_DIR] [--json]"
    parser.add_argument("words", nargs="*", metavar="GROUP_ID RUN_DIR", help="RUN_DIR: default the newest under runs/")
    parser.add_argument("--step", type=int, help="the training step whose samples are wanted")
    parser.add_argument("--json", action="store_true", help="print everything that is known as one JSON object")


def main(args: argparse.Namespace) -> int:
    words = list(args.words)
    group_id = words.pop(0) if args.step is None and words else None
    if len(words) > 1 or (group_id is None and args.step is None):
        raise ConfigError(
            "name a group or a step: `retort trace GROUP_ID [RUN_DIR]`, `retort trace --step N [RUN_DIR]`."
        )
    # Only now: this needs psutil, and the tracker `otel`, which has none, imports this module too.
    from retort.cli.status import newest_run

    directory = Path(words[0]) if words else newest_run(Path("runs"))
    run = load_config(directory / "config.toml", env={}).key_prefix
    if group_id is not None:
        file, group = find_group(directory, group_id)
        found = traced_group(directory, run, group, is_trained=file.parent.name == "rollouts")
        lines = group_lines(found)
    else:
        found = traced_step(directory, run, args.step)
        lines = step_lines(found)
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines))
    return 0


def trace_id(run: str, group_id: str) -> str:
    """32 hexadecimal digits, as OpenTelemetry counts them: a function of run and group, so nobody has to pass it on."""
    return hashlib.blake2b(f"{run}/{group_id}".encode(), digest_size=16).hexdigest()


def find_group(directory: Path, group_id: str) -> tuple[Path, Group]:
    """The file that has the group, and its line. Raises ConfigError with the nearest id where there is none."""
    known = []
    files = sorted(directory.glob("rollouts/step-*.jsonl")) + sorted(directory.glob("validation/step-*.jsonl"))
    for file in files:
        for line in whole_lines(file):
            name = msgspec.json.decode(line, type=_Name).group_id
            if name == group_id:
                return file, msgspec.json.decode(line, type=Group)
            known.append(name)
    nearest = difflib.get_close_matches(group_id, known, n=1, cutoff=0.0)
    hint = f"Did you mean {nearest[0]}?" if nearest else "It has not finished a step yet."
    raise ConfigError(f"{directory} has no group {group_id!r} among its {len(known)}. {hint}")


def traced_group(directory: Path, run: str, group: Group, *, is_trained: bool) -> dict[str, Any]:
    """A group with its samples; of a trained one also what its step came to."""
    return {
        "group_id": group.group_id,
        "trace_id": trace_id(run, group.group_id),
        "kind": "train" if is_trained else "validation",
        "data_source": group.data_source,
        "data_index": group.data_index,
        "question": group.question,
        "answer": group.answer,
        "sampled_by": group.sampled_by,
        "generate_seconds": group.generate_seconds,
        "score_seconds": group.score_seconds,
        **(_outcome(directory, group.step) if is_trained else {"measured_version": group.step}),
        "samples": [
            {
                "sample": number,
                "policy_versions": dict(sorted(Counter(sample.policy_versions).items())),
                **{name: getattr(sample, name) for name in Sample.__struct_fields__ if name != "policy_versions"},
            }
            for number, sample in enumerate(group.rollouts)
        ],
    }


def traced_step(directory: Path, run: str, step: int) -> dict[str, Any]:
    """What a step came to, and all of its groups. Raises ConfigError where the run has no such step."""
    file = directory / "rollouts" / f"step-{step:06d}.jsonl"
    if not file.exists():
        steps = sorted(int(re.sub(r"\D", "", file.stem)) for file in directory.glob("rollouts/step-*.jsonl"))
        has = f"It has the groups of steps {steps[0]} to {steps[-1]}" if steps else "It has not finished a step yet"
        raise ConfigError(f"{directory} has no step {step}. {has}.")
    return {
        **_outcome(directory, step),
        "groups": [traced_group(directory, run, group, is_trained=True) for group in groups_of(directory, step)],
    }


def groups_of(directory: Path, step: int) -> list[Group]:
    """The groups that a step was made of; none of step 0."""
    lines = whole_lines(directory / "rollouts" / f"step-{step:06d}.jsonl")
    return [msgspec.json.decode(line, type=Group) for line in lines]


def parts_of(directory: Path, step: int) -> dict[str, tuple[float, float]]:
    """When each part of a step began and ended: Unix times, from its first beginning to its last end."""
    times: dict[str, tuple[float, float]] = {}
    for span in _spans(directory, step):
        began, ended = times.get(span["part"], (math.inf, 0.0))
        times[span["part"]] = min(began, span["end"] - span["seconds"]), max(ended, span["end"])
    return times


def _outcome(directory: Path, step: int) -> dict[str, Any]:
    """The version that a step made, when it was published, its metrics, and the seconds of its parts."""
    spans = _spans(directory, step)
    seconds: Counter[str] = Counter()
    for span in spans:
        seconds[span["part"]] += span["seconds"]
    metrics = next((line for line in read_metrics(directory / "metrics.jsonl") if line["step"] == step), {})
    return {
        "step": step,
        # Its line is written when the version is published, and taken back when the step is to be trained again.
        "published_version": step if metrics else None,
        "published": max((span["end"] for span in spans if span["part"] == "weight_sync"), default=None),
        "metrics": {name: metrics[name] for name in UPDATE_METRICS if name in metrics},
        "bottleneck": bottleneck([metrics]) if metrics else "",
        "seconds": dict(seconds),
    }


def _spans(directory: Path, step: int) -> list[dict[str, Any]]:
    spans = (json.loads(line) for line in whole_lines(directory / "timeline.jsonl"))
    return [span for span in spans if span["step"] == step]


def group_lines(group: dict[str, Any]) -> list[str]:
    """A group as text, a line a sample."""
    question = " ".join(group["question"].split())
    lines = [
        f"group     {group['group_id']}, trace {group['trace_id']}",
        f"question  {group['data_index']} of {group['data_source']}: {_cut(question, 90)}",
        f"answer    {_cut(group['answer'], 90)}",
        f"sampled   by {group['sampled_by']} in {group['generate_seconds']:.3g} s, "
        f"scored in {group['score_seconds']:.3g} s",
        _ended(group) if group["kind"] == "train" else f"measured  policy version {group['measured_version']}",
        "",
    ]
    table: list[Sequence[str]] = [
        ("sample", "versions", "tokens", "end", "reward", "parsed", "advantage", "update", "gradient")
    ]
    for sample in group["samples"]:
        versions = sample["policy_versions"]
        row = (sample["sample"], _listed(versions), sum(versions.values()), sample["finish_reason"])
        judged = (f"{sample['reward']:g}", _cut(sample["parsed"], 24) or "-", _figure(sample["advantage"]))
        gradient = {True: "yes", False: "no", None: "-"}[sample["has_gradient"]]
        table.append((*map(str, row), *judged, _figure(sample["update"]), gradient))
    return lines + _aligned(table)


def step_lines(step: dict[str, Any]) -> list[str]:
    """A step as text: for each of its updates and each group, which of its samples made it."""
    lines = [_ended(step)]
    lines += [f"{name:<22}{value:.6g}" for name, value in step["metrics"].items()]
    lines += [f"{'seconds':<22}" + ", ".join(f"{part} {seconds:.3g}" for part, seconds in step["seconds"].items())]
    lines += [*filter(None, [step["bottleneck"]]), ""]
    table = [("update", "group", "replica", "versions", "samples", "gradient", "trace")]
    dealt = {sample["update"] for group in step["groups"] for sample in group["samples"]}
    for update in sorted(dealt, key=lambda number: number or 0):
        for group in step["groups"]:
            samples = [sample for sample in group["samples"] if sample["update"] == update]
            if samples:
                versions = sorted({version for sample in samples for version in sample["policy_versions"]})
                having = [sample["sample"] for sample in samples if sample["has_gradient"]]
                row = (_figure(update), group["group_id"], group["sampled_by"], _listed(versions))
                members = (_listed(sample["sample"] for sample in samples), _listed(having) or "-")
                table.append((*row, *members, group["trace_id"]))
    return lines + _aligned(table)


def _ended(outcome: dict[str, Any]) -> str:
    """In which update and version."""
    at = outcome["published"]
    when = time.strftime(" at %Y-%m-%d %H:%M:%S UTC", time.gmtime(at)) if at else ""
    if outcome["published_version"] is None:
        return f"trained   in step {outcome['step']}, of which no version was published yet"
    return f"trained   in step {outcome['step']}, published as policy version {outcome['published_version']}{when}"


def whole_lines(file: Path) -> Iterator[bytes]:
    """The whole lines of a file: the last may be half written, or the file not be there."""
    if file.exists():
        with file.open("rb") as lines:
            yield from (line for line in lines if line.endswith(b"\n"))


def _listed(values: Any) -> str:
    return ",".join(map(str, values))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cut(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
