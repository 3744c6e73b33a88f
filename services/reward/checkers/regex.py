"""A pattern that the completion has to match."""

from collections.abc import Mapping
from typing import Any, ClassVar

import re2

from services.reward.checkers import Checker, Example, Limits, Reward, Unscorable, Verdict, quoted

LONGEST_PATTERN = 2000
PATTERN_MEMORY_BYTES = 1 << 20
MODES = ("search", "fullmatch")


class Regex(Checker):
    """Reward 1 if the completion matches the answer, else 0.

    RE2 takes linear time for every pattern, but with some, a character costs a hundred times what it costs with
    others: ten seconds for 100,000 characters. Hence a worker process, which can be stopped.
    """

    name: ClassVar[str] = "regex"
    version: ClassVar[str] = "2"
    description: ClassVar[str] = "Matches the completion with the answer as a pattern, in linear time (RE2)."
    accepts: ClassVar[str] = (
        f"a pattern in RE2's syntax (no look-around, no back-references), {LONGEST_PATTERN} characters"
    )
    options: ClassVar[Mapping[str, str]] = {
        "mode": "search (the default: anywhere) or fullmatch (the whole completion)",
        "ignore_case": "true or false (the default)",
    }
    examples = (
        Example("It melts at 801 °C", r"\b801\b", 1.0),
        Example("801 °C", r"\d+", 0.0, {"mode": "fullmatch"}),
    )
    deterministic: ClassVar[bool] = True
    limits: ClassVar[Limits] = Limits(seconds=2.0)

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        mode, ignore_case = options.get("mode", "search"), options.get("ignore_case", "false")
        if mode not in MODES or ignore_case not in ("true", "false"):
            return Unscorable(
                reason=f"options mode = {quoted(mode)}, ignore_case = {quoted(ignore_case)}; regex takes search or "
                "fullmatch, and true or false"
            )
        if not 0 < len(answer) <= LONGEST_PATTERN:
            return Unscorable(reason=f"answer has {len(answer)} characters; regex takes 1 to {LONGEST_PATTERN}")
        try:
            pattern = _compile(answer, ignore_case == "true")
        except re2.error as error:
            return Unscorable(reason=f"answer = {quoted(answer)} is no pattern of RE2: {_text(error)}")
        match = pattern.search(completion) if mode == "search" else pattern.fullmatch(completion)
        return Reward(
            value=1.0 if match else 0.0,
            correct=match is not None,
            parsed=match.group() if match else "",
            format_ok=match is not None,
            rule=mode,
            explanation=f"the completion {'matches' if match else 'does not match'} {quoted(answer)}",
        )


def _compile(pattern: str, ignore_case: bool) -> Any:
    options = re2.Options()
    options.max_mem = PATTERN_MEMORY_BYTES
    options.log_errors = False
    options.case_sensitive = not ignore_case
    return re2.compile(pattern, options=options)


def _text(error: Exception) -> str:
    detail = error.args[0] if error.args else ""
    return detail.decode(errors="replace") if isinstance(detail, bytes) else str(detail)
