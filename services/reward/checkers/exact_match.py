"""The whole completion is the answer."""

from collections.abc import Mapping
from typing import ClassVar

from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict, quoted


class ExactMatch(Checker):
    """Reward 1 if completion and answer, stripped of whitespace, are equal, else 0. Any format will do."""

    name: ClassVar[str] = "exact_match"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Compares the whole completion with the answer, both stripped of whitespace."
    accepts: ClassVar[str] = "the expected text"
    options: ClassVar[Mapping[str, str]] = {"ignore_case": "true or false (the default)"}
    examples = (Example(" NaCl\n", "NaCl", 1.0), Example("nacl", "NaCl", 1.0, {"ignore_case": "true"}))
    quick: ClassVar[bool] = True
    immediate: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        if not answer.strip():
            return Unscorable(reason="answer is empty; exact_match needs the text to compare with")
        ignore_case = options.get("ignore_case", "false")
        if ignore_case not in ("true", "false"):
            return Unscorable(reason=f"option ignore_case = {quoted(ignore_case)}; exact_match takes true or false")

        parsed, expected = completion.strip(), answer.strip()
        correct = parsed.casefold() == expected.casefold() if ignore_case == "true" else parsed == expected
        return Reward(
            value=1.0 if correct else 0.0,
            correct=correct,
            parsed=parsed,
            format_ok=True,
            rule="equal_ignoring_case" if ignore_case == "true" else "equal",
            explanation=f"read {quoted(parsed)}, the answer is {quoted(expected)}",
        )
