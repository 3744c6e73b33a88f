"""The grader of the reference run for multiple-choice questions."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict, quoted

# What follows the last opening tag of a well-formed completion. `$` also matches before one final newline, and the
# reference run counted such a completion as well-formed.
STRICT_FORMAT = re.compile(r"\s*[A-D]\s*</answer>$")
SHORT = 20
"""Characters after the last tag and of the answer together, for a verdict that is remembered."""


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
    immediate: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        if not answer:
            return Unscorable(reason="answer is empty; mcq needs the right option's letter, for example B")
        _, tag, after = completion.rpartition("<answer>")
        return (_remembered if len(after) + len(answer) <= SHORT else _verdict)(after, answer, bool(tag))


def _verdict(after: str, answer: str, in_tag: bool) -> Reward:
    parsed = after.partition("</answer>")[0].strip()
    correct = parsed == answer
    return Reward(
        value=1.0 if correct else 0.0,
        correct=correct,
        parsed=parsed,
        format_ok=in_tag and STRICT_FORMAT.match(after) is not None,
        rule="last_answer_tag" if in_tag else "whole_text",
        explanation=f"read {quoted(parsed)}, the answer is {quoted(answer)}",
    )


# A tag with a letter is nearly all there is.
_remembered = lru_cache(maxsize=512)(_verdict)
