"""Scores one item with the checker that it names: whatever happens inside a checker, there is a verdict."""

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from services.reward.checkers import Checker, Reward, Unscorable, Verdict

MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Scored:
    """A verdict and who gave it."""

    verdict: Verdict
    checker: str
    """name@version; empty if there is no checker of that name."""
    seconds: float
    """Time in the checker."""


def score(
    checkers: Mapping[str, Checker], *, name: str, completion: str, answer: str, options: Mapping[str, str]
) -> Scored:
    """The verdict of the checker called `name`. Never raises because of the item or of the checker."""
    checker = checkers.get(name)
    if checker is None:
        return Scored(Unscorable(reason=f"no checker {name!r}; known: {', '.join(checkers)}"), "", 0.0)

    started = time.perf_counter()
    verdict = _check(checker, completion, answer, options)
    return Scored(verdict, f"{checker.name}@{checker.version}", time.perf_counter() - started)


def _check(checker: Checker, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
    unknown = sorted(options.keys() - checker.options.keys())
    if unknown:
        known = ", ".join(sorted(checker.options)) or "none"
        return Unscorable(reason=f"{checker.name} has no option {', '.join(unknown)}; known: {known}")
    try:
        verdict = checker.check(completion, answer, options)
    # The one border to code that others wrote: whatever it raises must cost this item only, not its batch.
    except Exception as error:  # noqa: BLE001
        return Unscorable(reason=f"{checker.name} raised {_describe(error)}")
    if not isinstance(verdict, Reward | Unscorable):
        return Unscorable(reason=f"{checker.name} returned {type(verdict).__name__}, neither Reward nor Unscorable")
    return verdict


def _describe(error: Exception) -> str:
    # Not str(error), which is foreign code too. Escaped, because a lone surrogate in it could not be sent.
    text = "".join(traceback.format_exception_only(error)).strip()
    return text[:MAX_ERROR_CHARACTERS].encode(errors="backslashreplace").decode()
