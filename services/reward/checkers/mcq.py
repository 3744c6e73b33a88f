"""The grader of the reference run for multiple-choice questions."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict, quoted

# What follows the last opening tag of a well-formed completion. `$` also matches before one final newline, and the
# reference run counted such a completion as well-formed.
STRICT_FORMAT = re.compile(r"\s*[A-D]\s*</answer>$")


class MultipleChoice(Checker):
    """Exactly the rule of the reference run: no partial credit, no format penalty, no leniency.

    What counts is the text after the last `<answer>` (the whole text without one), up to the first
    `</answer>` after it (to the end without one), stripped of whitespace. The reward is 1 if that equals the
    answer, else 0.
    """

    name: ClassVar[str] = "mcq"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Compares the text in the last <answer> tag with the right option's letter."
    accepts: ClassVar[str] = "the right option's letter, for example B"
    examples = (
        Example("Two protons. <answer>B</answer>", "B", 1.0),
        Example("Two protons. <answer>(B)</answer>", "B", 0.0),
    )
    quick: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        if not answer:
            return Unscorable(reason="answer is empty; mcq needs the right option's letter, for example B")
        _, tag, after = completion.rpartition("<answer>")
        parsed = after.partition("</answer>")[0].strip()
        format_ok = bool(tag) and STRICT_FORMAT.match(after) is not None
        return (_remembered if len(parsed) == len(answer) == 1 else _verdict)(parsed, answer, bool(tag), format_ok)


def _verdict(parsed: str, answer: str, in_tag: bool, format_ok: bool) -> Reward:
    correct = parsed == answer
    return Reward(
        value=1.0 if correct else 0.0,
        correct=correct,
        parsed=parsed,
        format_ok=format_ok,
        rule="last_answer_tag" if in_tag else "whole_text",
        explanation=f"read {quoted(parsed)}, the answer is {quoted(answer)}",
    )


# Letters against letters are nearly all there is.
_remembered = lru_cache(maxsize=512)(_verdict)
