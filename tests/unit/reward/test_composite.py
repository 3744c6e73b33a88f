import json
import re

import pytest

from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.composite import Composite, Part


def reward(value: float) -> Reward:
    return Reward(value=value, correct=value == 1, parsed="x", format_ok=True, rule="r", explanation="")


def test_the_reward_is_the_weighted_mean() -> None:
    parts = [Part("mcq", "B", weight=3), Part("regex", "B", weight=1)]
    verdict = Composite().combine(parts, [reward(1.0), reward(0.0)])
    assert isinstance(verdict, Reward)
    assert (verdict.value, verdict.correct, verdict.rule) == (0.75, False, "weighted_mean")


def test_a_gate_that_is_not_passed_makes_it_0() -> None:
    parts = [Part("mcq", "B"), Part("regex", "B", weight=0, gate=True)]
    verdict = Composite().combine(parts, [reward(1.0), reward(0.0)])
    assert isinstance(verdict, Reward)
    assert (verdict.value, verdict.correct, verdict.rule) == (0.0, False, "gate:regex")


def test_an_unscorable_part_makes_the_whole_unscorable() -> None:
    verdict = Composite().combine([Part("mcq", "")], [Unscorable(reason="answer is empty")])
    assert verdict == Unscorable(reason="part 0 (mcq): answer is empty")


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ("B", "is no list of parts"),
        ([], "answer has 0 parts"),
        ([{"checker": "composite", "answer": ""}], "a part cannot have parts"),
        ([{"checker": "mcq", "answer": "B", "weight": -1}], r"answer\[0\].weight = -1"),
        ([{"checker": "mcq", "answer": "B", "weight": 0}], "all weights are 0"),
        ([{"checker": "mcq", "answer": "B", "wieght": 0}], "wieght"),
    ],
)
def test_an_answer_that_is_no_list_of_parts_is_unscorable(parts: object, problem: str) -> None:
    verdict = Composite().parts(parts if isinstance(parts, str) else json.dumps(parts), {})
    assert isinstance(verdict, Unscorable)
    assert re.search(problem, verdict.reason), verdict.reason
