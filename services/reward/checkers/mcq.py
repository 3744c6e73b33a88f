"""The grader of the reference run for multiple-choice questions."""

import re
import reprlib
from collections.abc import Mapping
from typing import ClassVar

from services.reward.checkers import Reward, Unscorable, Verdict

# `$` also matches before one final newline, and the reference run counted such a completion as well-formed.
STRICT_FORMAT = re.compile(r"<answer>\s*[A-D]\s*</answer>$")


class MultipleChoice:
    """Exactly the rule of the reference run: no partial credit, no format penalty, no leniency.

    What counts is the text after the last `<answer>` (the whole text without one), up to the first
    `</answer>` after it (to the end without one), stripped of whitespace. The reward is 1 if that equals the
    answer, else 0.
    """

    name: ClassVar[str] = "mcq"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Compares the text in the last <answer> tag with the right option's letter."
    options: ClassVar[Mapping[str, str]] = {}

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        if not answer:
            return Unscorable(reason="answer is empty; mcq needs the right option's letter, for example B")
        _, tag, after = completion.rpartition("<answer>")
        parsed = after.partition("</answer>")[0].strip()
        correct = parsed == answer
        return Reward(
            value=1.0 if correct else 0.0,
            correct=correct,
            parsed=parsed,
            format_ok=STRICT_FORMAT.search(completion) is not None,
            rule="last_answer_tag" if tag else "whole_text",
            explanation=f"read {reprlib.repr(parsed)}, the answer is {reprlib.repr(answer)}",
        )
