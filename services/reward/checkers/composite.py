"""Several checkers in one reward."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict, quoted

MAX_PARTS = 16


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One checker of a composite."""

    checker: str
    answer: str
    weight: float = 1.0
    """Share in the weighted mean, before normalising; 0 for a part that is only a gate."""
    gate: bool = False
    """Whether the whole reward is 0 unless this part is correct."""
    options: dict[str, str] = {}


class Composite(Checker):
    """The weighted mean of the parts' rewards; 0 as soon as a gate is not correct.

    The service runs the parts, each where its checker runs. If one of them is unscorable, so is the whole.
    """

    name: ClassVar[str] = "composite"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Weighted mean of several checkers, with gates that have to be passed."
    accepts: ClassVar[str] = (
        'JSON: [{"checker": "mcq", "answer": "B", "weight": 0.9}, {"checker": "regex", "answer": "^<reasoning>", '
        '"weight": 0.1, "gate": true, "options": {}}], 1 to 16 parts'
    )
    examples = (
        Example(
            "<answer>B</answer>",
            '[{"checker": "mcq", "answer": "B", "weight": 3}, {"checker": "exact_match", "answer": "B"}]',
            0.75,
        ),
        Example(
            "<answer>B</answer>",
            '[{"checker": "mcq", "answer": "B"}, {"checker": "regex", "answer": "because", "weight": 0, "gate": true}]',
            0.0,
        ),
    )

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        return Unscorable(reason="composite runs in the service only: it needs the other checkers")

    def parts(self, answer: str, options: Mapping[str, str]) -> list[Part] | Unscorable:
        """The parts that the answer names."""
        if options:
            return Unscorable(reason=f"composite has no option {', '.join(sorted(options))[:200]}; known: none")
        try:
            parts = msgspec.json.decode(answer, type=list[Part])
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
            return Unscorable(reason=f"answer = {quoted(answer)} is no list of parts: {error}")
        if not 1 <= len(parts) <= MAX_PARTS:
            return Unscorable(reason=f"answer has {len(parts)} parts; composite takes 1 to {MAX_PARTS}")
        problem = _problem(parts)
        return Unscorable(reason=problem) if problem else parts

    def combine(self, parts: Sequence[Part], verdicts: Sequence[Verdict]) -> Verdict:
        """One verdict from those of the parts."""
        rewards: list[Reward] = []
        for index, (part, verdict) in enumerate(zip(parts, verdicts, strict=True)):
            if isinstance(verdict, Unscorable):
                return Unscorable(reason=f"part {index} ({part.checker}): {verdict.reason}")
            rewards.append(verdict)
        closed = [part.checker for part, reward in zip(parts, rewards, strict=True) if part.gate and not reward.correct]
        total = sum(part.weight for part in parts)
        mean = sum(part.weight * reward.value for part, reward in zip(parts, rewards, strict=True)) / total
        return Reward(
            value=0.0 if closed else mean,
            correct=not closed and all(r.correct for p, r in zip(parts, rewards, strict=True) if p.weight),
            parsed=next((r.parsed for p, r in zip(parts, rewards, strict=True) if p.weight), ""),
            format_ok=all(reward.format_ok for reward in rewards),
            rule=f"gate:{closed[0]}" if closed else "weighted_mean",
            explanation="; ".join(
                f"{part.checker} {reward.value:g} × {part.weight:g}"
                for part, reward in zip(parts, rewards, strict=True)
            ),
        )


def _problem(parts: Sequence[Part]) -> str:
    """What is wrong with one of the parts; empty if nothing is."""
    for index, part in enumerate(parts):
        if part.checker == Composite.name:
            return f"answer[{index}].checker = composite; a part cannot have parts"
        if not 0 <= part.weight <= 1e6:
            return f"answer[{index}].weight = {part.weight}; give a number from 0 to a million"
    return "" if any(part.weight for part in parts) else "answer: all weights are 0; give at least one part a weight"
