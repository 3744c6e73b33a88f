"""Multiple choice for models that do not keep to the format."""

import re
from collections.abc import Mapping
from typing import ClassVar

from services.reward.answer_text import last_answer_tag
from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict, quoted

DECORATION = " \t\r\n()[]{}*_`'\"$.:,;!"
LETTER = re.compile(r"[A-Za-z]")
BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Za-z])\)?\s*\}")
STATED = re.compile(r"(?i:answer|option|choice)(?i: is)?[ \t:*]{1,8}[(\[*]{0,4}([A-Z])(?![A-Za-z])")
LAST_CHARACTERS = 2000
"""Statements are looked for in the end of the completion only."""


class LenientMultipleChoice(Checker):
    """The first of these rules that finds a letter decides; its case does not matter.

    1. `answer_tag`: the text in the last `<answer>` tag, as `mcq` reads it, is one letter but for brackets, quotes,
       stars, dots and blanks around it, or starts with one letter and then `.`, `:` or `)` ("B: helium").
    2. `boxed`: the last `\\boxed{B}`.
    3. `stated`: the last "answer is B", "Answer: (B)", "option B" or "choice B"; here the letter is upper-case.
    4. `whole_text`: the completion, up to a lone `</answer>` if there is one, is one line that reads as in rule 1. Not
       more lines: a model that repeats the options starts with "A:" and has chosen nothing.

    A completion in which none finds a letter has reward 0.
    """

    name: ClassVar[str] = "mcq_lenient"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = (
        "Finds the chosen letter in a tag, a box or a statement, brackets and case aside, and compares it."
    )
    accepts: ClassVar[str] = "the right option's letter, for example B"
    examples = (
        Example("The answer is (B).", "B", 1.0),
        Example("<answer>b: helium</answer>", "B", 1.0),
        Example("I cannot tell.", "B", 0.0),
    )
    quick: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        expected = answer.strip().upper()
        if not (len(expected) == 1 and "A" <= expected <= "Z"):
            return Unscorable(reason=f"answer = {quoted(answer)}; mcq_lenient needs one letter, for example B")
        parsed, rule = _read(completion)
        correct = parsed == expected
        return Reward(
            value=1.0 if correct else 0.0,
            correct=correct,
            parsed=parsed,
            format_ok=rule == "answer_tag",
            rule=rule,
            explanation=f"read {parsed or 'no letter'}, the answer is {expected}",
        )


def _read(completion: str) -> tuple[str, str]:
    """The chosen letter, upper-case, and the rule that found it; no letter and `none` if no rule did."""
    text, place = last_answer_tag(completion)
    if place == "last_answer_tag" and (letter := _only_letter(text)):
        return letter, "answer_tag"
    end = completion[-LAST_CHARACTERS:]
    for rule, pattern in (("boxed", BOXED), ("stated", STATED)):
        if found := pattern.findall(end):
            return found[-1].upper(), rule
    if place == "whole_text" and "\n" not in text and (letter := _only_letter(text)):
        return letter, "whole_text"
    return "", "none"


def _only_letter(text: str) -> str:
    bare = text[:LAST_CHARACTERS].lstrip(DECORATION)
    head, rest = bare[:1], bare[1:]
    alone = not rest.strip(DECORATION) and len(text) <= LAST_CHARACTERS
    return head.upper() if LETTER.fullmatch(head) and (alone or rest[:1] in (".", ":", ")")) else ""
