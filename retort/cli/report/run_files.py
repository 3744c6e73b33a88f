"""Read what a run left behind, however far it came: every file may be missing, and a last line half written."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from retort.cli.invocation import command
from retort.config import ConfigError, RunConfig, load_config
from retort.metrics_file import read_metrics

QUESTIONS_SHOWN = 6
"""Of a validation; of a training step as many as the page has room for."""
GROUPS_READ = 256
TOKENS_READ = 2_000_000
"""A step of a large run is a file of gigabytes: only its first groups are read, up to either number."""

Line = TypeVar("Line", bound=msgspec.Struct)


class RolloutLine(msgspec.Struct, frozen=True):
    """One completion as the trainer wrote it down."""

    completion_ids: list[int]
    policy_versions: list[int]
    finish_reason: str
    reward: float
    parsed: str
    text: str
    format_ok: bool = True
    advantage: float | None = None
    demonstration: int | None = None
    """Index of the sibling whose solution the teacher saw."""
    token_weights: list[float] | None = None


class GroupLine(msgspec.Struct, frozen=True):
    """One question with all its completions."""

    data_index: int
    data_source: str
    question: str
    answer: str
    rollouts: list[RolloutLine]

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts]


class GivenUpLine(msgspec.Struct, frozen=True):
    """A group that nobody could finish."""

    group_id: str
    question: str
    answer: str
    reason: str


class _RewardLine(msgspec.Struct, frozen=True):
    reward: float


class _GroupRewards(msgspec.Struct, frozen=True):
    data_index: int
    rollouts: list[_RewardLine]


class Span(msgspec.Struct, frozen=True):
    """A part of a step, as the trainer wrote it down when it ended; times in seconds, since 1970 for `end`."""

    part: str
    step: int
    end: float
    seconds: float

    @property
    def start(self) -> float:
        return self.end - self.seconds


@dataclass(frozen=True)
class Validation:
    """One validation: every question's mean reward, and the full completions of a few questions."""

    version: int
    accuracy: Mapping[int, float]
    """data_index -> mean reward of the question's completions."""
    shown: Mapping[int, GroupLine]


@dataclass(frozen=True)
class TrainingStep:
    step: int
    groups: Sequence[GroupLine]
    """Those that teach first."""


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    directory: Path
    config: RunConfig | None
    config_text: str
    metrics: Sequence[Mapping[str, float]]
    """One mapping a step, ascending; finite numbers only."""
    spans: Sequence["Span"]
    """When each part of each step ran, repeated steps included."""
    status: Mapping[str, Any]
    training: Sequence[TrainingStep]
    """The first and the last step, or the only one, or none."""
    validations: Sequence[Validation]
    """The first and the last validation, or the only one, or none."""
    given_up: Sequence[GivenUpLine]
    """Each group once, with the last reason."""

    @property
    def name(self) -> str:
        return self.config.name if self.config else self.directory.resolve().name

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def validated(self) -> dict[str, int]:
        """Data sources that were validated, with the number of completions per question."""
        keys = (VALIDATION_KEY.fullmatch(key) for line in self.metrics for key in line)
        return {key[1]: int(key[2]) for key in keys if key}

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric was logged."""
        return [(line["step"], line[key]) for line in self.metrics if key in line]


VALIDATION_KEY = re.compile(r"val-core/(.+)/acc/mean@(\d+)")


def read_run(directory: Path) -> Run:
    """Raises ConfigError when there is no such directory."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such run directory. Runs are in runs/; `{command('status')}` lists them.")
    config_file = directory / "config.toml"
    rollout_files = _numbered(directory / "rollouts")
    validation_files = _numbered(directory / "validation")
    return Run(
        directory=directory,
        config=_config(config_file),
        config_text=config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
        metrics=read_metrics(directory / "metrics.jsonl"),
        spans=[*_parsed(directory / "timeline.jsonl", Span)],
        status=read_run_status(directory),
        training=[TrainingStep(step, _informative_groups(file)) for step, file in _ends(rollout_files)],
        validations=_validations(_ends(validation_files)),
        given_up=[*{one.group_id: one for one in _parsed(directory / "given_up.jsonl", GivenUpLine)}.values()],
    )


def _config(path: Path) -> RunConfig | None:
    try:
        return load_config(path, env={})
    except ConfigError:
        return None


def read_run_status(directory: Path) -> dict[str, Any]:
    """What the launcher last wrote of the run; empty where it is missing or not whole."""
    try:
        status = json.loads((directory / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _validations(files: Sequence[tuple[int, Path]]) -> list[Validation]:
    accuracies = [_accuracy(file) for _, file in files]
    everywhere = sorted(set.intersection(*map(set, accuracies))) if accuracies else []
    chosen = set(_spread(everywhere, QUESTIONS_SHOWN))
    return [
        Validation(
            version=version,
            accuracy=accuracy,
            shown={group.data_index: group for group in _parsed(file, GroupLine) if group.data_index in chosen},
        )
        for (version, file), accuracy in zip(files, accuracies, strict=True)
    ]


def _accuracy(path: Path) -> dict[int, float]:
    return {
        group.data_index: sum(r.reward for r in group.rollouts) / len(group.rollouts)
        for group in _parsed(path, _GroupRewards)
        if group.rollouts
    }


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` items at even distances, so that nobody chose them by their result."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _informative_groups(path: Path) -> list[GroupLine]:
    """Groups with right and wrong completions first: only these have advantages other than zero."""
    groups: list[GroupLine] = []
    tokens = 0
    for group in _parsed(path, GroupLine):
        groups.append(group)
        tokens += sum(len(rollout.completion_ids) for rollout in group.rollouts)
        if len(groups) == GROUPS_READ or tokens >= TOKENS_READ:
            break
    return sorted(groups, key=lambda group: len(set(group.rewards)) == 1)


def _parsed(path: Path, kind: type[Line]) -> Iterator[Line]:
    decoder = msgspec.json.Decoder(kind)
    for text in _lines(path):
        try:
            yield decoder.decode(text)
        except msgspec.DecodeError:
            continue


def _lines(path: Path) -> Iterable[bytes]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        yield from file


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    """Files `step-000012.jsonl` with their numbers, ascending."""
    found = ((re.fullmatch(r"step-(\d+)\.jsonl", file.name), file) for file in directory.glob("step-*.jsonl"))
    return sorted((int(match[1]), file) for match, file in found if match)


def _ends(files: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    return [files[0], files[-1]] if len(files) > 1 else list(files)
