"""Runs a checker on one item: whatever happens inside it, there is a verdict."""

import time
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

from services.reward.checkers import Checker, Reward, Unscorable, Verdict, defect

MAX_ERROR_CHARACTERS = 500

identity = object.__hash__
"""Different for different objects that live, like id(), which would call the audit hook of retort/unpickling.py each
time: a sixth of a batch's rate."""


class Item(msgspec.Struct, frozen=True, gc=False):
    """What is to be scored. Both faces make their requests into these: a protobuf message copies a text each time
    that it is looked at."""

    id: str
    checker: str
    completion: str
    answer: str
    options: Mapping[str, str] = MappingProxyType({})


class Scored(msgspec.Struct, frozen=True, gc=False):
    """A verdict and who gave it."""

    verdict: Verdict
    checker: str
    """name@version; empty if there is no checker of that name."""
    seconds: float
    """Time in the checker; for quick ones the mean over the items that were scored one after the other."""


def check(checker: Checker, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
    """The verdict of the checker. Never raises because of the item or of the checker."""
    return sound(checker, check_unseen(checker, completion, answer, options))


def check_unseen(checker: Checker, completion: str, answer: str, options: Mapping[str, str]) -> object:
    """What the checker returned, which may be anything, or Unscorable if it raised."""
    if options and (unknown := sorted(set(options) - checker.options.keys())):
        known = ", ".join(sorted(checker.options)) or "none"
        return Unscorable(reason=f"{checker.name} has no option {', '.join(unknown)[:200]}; known: {known}")
    try:
        return checker.check(completion, answer, options)
    # The one border to code that others wrote: whatever it raises must cost this item only, not its batch. Also
    # SystemExit and the like, which would end the service; its own signals and cancellations never arrive as such here.
    except BaseException as error:  # noqa: BLE001  # foreign code
        return Unscorable(reason=f"{checker.name} raised {_describe(error)}")


def check_run(checker: Checker, items: Sequence[Item]) -> list[Scored]:
    """The results of items for one checker. Items that were given the same verdict share one result."""
    before = time.perf_counter()
    returned = [check_unseen(checker, item.completion, item.answer, item.options) for item in items]
    seconds = (time.perf_counter() - before) / len(items)
    # By identity, which holds as long as `returned` does: most verdicts of a batch are one of a few.
    keys = list(map(identity, returned))
    scored = {
        key: Scored(sound(checker, one), checker.label, seconds)
        for key, one in dict(zip(keys, returned, strict=True)).items()
    }
    return [scored[key] for key in keys]


def sound(checker: Checker, returned: object) -> Verdict:
    """What a checker returned if it is a verdict that can be sent, else Unscorable."""
    if problem := defect(returned):
        return Unscorable(reason=f"{checker.name} returned {problem}")
    assert isinstance(returned, Reward | Unscorable)
    if type(returned) is Reward and type(returned.value) is int:
        # An integer of more than 64 bits could not be sent as one.
        return msgspec.structs.replace(returned, value=float(returned.value))
    return returned


def _describe(error: BaseException) -> str:
    # Not str(error), which is foreign code too. Escaped, because a lone surrogate in it could not be sent.
    text = "".join(traceback.format_exception_only(error)).strip()
    return text[:MAX_ERROR_CHARACTERS].encode(errors="backslashreplace").decode()
