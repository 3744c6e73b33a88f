"""What a checker is. The built-in ones stand here, one file each; `discovery` finds all others."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import ClassVar, TypeAlias

import msgspec


class Reward(msgspec.Struct, frozen=True, kw_only=True, tag="reward"):
    """A completion was scored."""

    value: float
    """Finite."""
    correct: bool
    """Whether the checker takes the answer as right."""
    parsed: str
    """What the checker read as the answer."""
    format_ok: bool
    """Whether the completion has the format that was asked for."""
    rule: str
    """The rule that decided, as an identifier."""
    explanation: str
    """One sentence for people."""


class Unscorable(msgspec.Struct, frozen=True, kw_only=True, tag="unscorable"):
    """No reward can be given. Never the same as a reward of 0."""

    reason: str
    """What happened, with which value, and what to do."""


Verdict: TypeAlias = Reward | Unscorable


def defect(verdict: object) -> str:
    """What is wrong with what a checker returned; empty if it is a verdict that can be sent."""
    texts: tuple[tuple[str, object], ...]
    if type(verdict) is Reward:
        if not _is_finite(verdict.value):
            return "a reward that is not a finite number"
        if type(verdict.correct) is not bool or type(verdict.format_ok) is not bool:
            return "a reward whose correct and format_ok are not both true or false"
        texts = ("parsed", verdict.parsed), ("rule", verdict.rule), ("explanation", verdict.explanation)
    elif type(verdict) is Unscorable:
        texts = (("reason", verdict.reason),)
    else:
        return f"{type(verdict).__name__}, neither Reward nor Unscorable"
    for name, text in texts:
        if type(text) is not str:
            return f"{type(text).__name__} as {name}, not a text"
        if not (text.isascii() or is_encodable(text)):
            return f"{name} with a lone surrogate, which cannot be sent"
    return ""


def _is_finite(value: object) -> bool:
    """Whether it is a number that a double holds."""
    if type(value) not in (float, int):
        return False
    try:
        return isfinite(value)  # type: ignore[arg-type]  # one of the two above
    except OverflowError:
        return False


def is_encodable(text: str) -> bool:
    """Whether the text can be written as UTF-8: one with lone surrogates cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Limits:
    """What one item may use in a worker process."""

    seconds: float = 5.0
    """Wall-clock time; at its end the worker is killed and replaced. The CPU time is limited to the same."""
    memory_mib: int = 256
    """Address space beyond what the worker has when it starts, in MiB."""
    starts_processes: bool = False
    """Whether the checker itself (never what it runs) may fork."""


@dataclass(frozen=True, slots=True)
class Example:
    """An item and the reward that it has."""

    completion: str
    answer: str
    reward: float
    options: Mapping[str, str] | None = None


class Checker(ABC):
    """A pure function (completion, answer, options) -> verdict with a name and a version.

    What it raises makes that one item unscorable. Unless it is `quick`, it runs in a worker process without a
    network, under `limits`, with modules as the service found them when it started.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    """Changes whenever any verdict may change."""
    description: ClassVar[str]
    """How it decides, in one sentence."""
    accepts: ClassVar[str] = "text"
    """What an answer has to be."""
    options: ClassVar[Mapping[str, str]] = {}
    """The options that `check` may be given: name and meaning. Any other makes the item unscorable."""
    examples: ClassVar[Sequence[Example]] = ()
    quick: ClassVar[bool] = False
    """Whether its time is linear in its input, whatever that is, and short: nothing stops it. Then it runs in a
    thread of the service."""
    immediate: ClassVar[bool] = False
    """Whether it is quick and only finds and compares texts, and waits for nothing. Then a small batch is scored in
    the event loop: its way to a thread and back would take longer than its verdicts."""
    deterministic: ClassVar[bool] = False
    """Whether equal items always have equal verdicts, so that one may be remembered."""
    limits: ClassVar[Limits] = Limits()

    @cached_property
    def label(self) -> str:
        """Name and version, as results give them."""
        return f"{self.name}@{self.version}"

    @abstractmethod
    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        """The verdict. Several threads may call it at the same time if it is `quick`."""

    def prepare(self) -> None:  # noqa: B027  # most have nothing to do
        """Import what `check` needs. Called once, in the process from which the workers are forked."""


def quoted(text: str) -> str:
    """The text as an explanation shows it: in quotes, escaped, its middle left out if it is long."""
    return repr(text) if len(text) <= 40 else repr(f"{text[:20]}…{text[-15:]}")
