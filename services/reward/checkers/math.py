"""Mathematical equality, by math-verify."""

import logging
from collections.abc import Mapping
from typing import ClassVar

from services.reward.checkers import Checker, Example, Limits, Reward, Unscorable, Verdict, quoted

NOTATIONS = (
    r"$\boxed{x^2-1}$",
    r"$\{1,2\}$",
    "$(1,2]$",
    r"$\sqrt{2} + \pi$",
    r"$\begin{pmatrix}1&2\\3&4\end{pmatrix}$",
    "$x=5$",
    r"$\sin(x) \le 3$",
    "5 + 1 = 6",
)
"""What models write, one of each kind."""


class Math(Checker):
    """Reward 1 if math-verify finds the completion's answer equal to the reference, else 0.

    Runs in a worker process: sympy can take for ever on a short text, and parts of it evaluate what they parse.
    """

    name: ClassVar[str] = "math"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Parses both sides (LaTeX or plain) with math-verify and compares them symbolically."
    accepts: ClassVar[str] = "a number, an expression, a set, an interval, … in LaTeX; without dollars they are added"
    examples = (
        Example(r"So the result is $\boxed{0.5}$.", r"\frac{1}{2}", 1.0),
        Example("$x^2 + 2x + 1$", "(x+1)^2", 1.0),
        Example("42", "41", 0.0),
    )
    deterministic: ClassVar[bool] = True
    limits: ClassVar[Limits] = Limits(seconds=5.0, memory_mib=512)

    def prepare(self) -> None:
        # The parser and sympy build tables when a notation is first used, up to 0.1 s each; workers inherit them.
        for example in self.examples:
            self.check(example.completion, example.answer, {})
        for notation in NOTATIONS:
            self.check(notation, notation, {})

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        from math_verify import parse, verify

        # It warns for each call that the time limit is ours to keep; that is what the worker process is for.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        # The answer is known to be mathematics and may come without the dollars that mark it.
        gold = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=None)
        gold = gold or parse(answer, parsing_timeout=None)
        if not gold:
            return Unscorable(reason=f"answer = {quoted(answer)}; math-verify finds no expression in it")
        found = parse(completion, parsing_timeout=None)
        correct = bool(found) and verify(gold, found, timeout_seconds=None)
        parsed = str(found[-1])[:1000] if found else ""
        return Reward(
            value=1.0 if correct else 0.0,
            correct=correct,
            parsed=parsed,
            format_ok="\\boxed" in completion,
            rule="symbolic" if found else "no_expression",
            explanation=f"read {quoted(parsed)}, the answer is {quoted(answer)}",
        )
