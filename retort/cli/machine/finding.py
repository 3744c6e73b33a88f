"""What a check says."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    name: str
    state: State
    text: str
    fix: str = ""
    """What to do, for a line that is not in order."""


Answer = tuple[State, str, str]
Check = Callable[[], Answer]


def ok(text: str) -> Answer:
    return State.OK, text, ""


def warning(text: str, fix: str) -> Answer:
    return State.WARNING, text, fix


def failed(text: str, fix: str) -> Answer:
    return State.FAILED, text, fix


def skipped(text: str) -> Answer:
    return State.SKIPPED, text, ""
