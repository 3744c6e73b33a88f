"""What a checker is. The built-in ones stand here, one file each; `discovery` finds all others."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Protocol, TypeAlias, runtime_checkable

from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat


def _encodable(text: str) -> str:
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Validated(BaseModel):
    """Built inside a checker: a NaN or a wrong type fails there, for one item, and not on the wire."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Reward(_Validated):
    """A completion was scored. ValidationError: the value is not finite, or a text has lone surrogates."""

    value: FiniteFloat
    correct: bool
    """Whether the checker takes the answer as right."""
    parsed: Text
    """What the checker read as the answer."""
    format_ok: bool
    """Whether the completion has the format that was asked for."""
    rule: Text
    """The rule that decided, as an identifier."""
    explanation: Text
    """One sentence for people."""


class Unscorable(_Validated):
    """No reward can be given. Never the same as a reward of 0."""

    reason: Text
    """What happened, with which value, and what to do."""


Verdict: TypeAlias = Reward | Unscorable


@runtime_checkable
class Checker(Protocol):
    """A pure function (completion, answer, options) -> verdict with a name and a version.

    `check` runs in a thread, several at a time. What it raises makes that one item unscorable.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    """Changes whenever any verdict may change."""
    description: ClassVar[str]
    """How it decides, in one sentence."""
    options: ClassVar[Mapping[str, str]]
    """The options that `check` may be given: name and meaning. Any other makes the item unscorable."""

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict: ...
