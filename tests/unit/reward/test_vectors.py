"""The checker `mcq` grades as the reference run did."""

from typing import Any

import pytest

from services.reward.checkers import Reward
from services.reward.checkers.mcq import MultipleChoice
from tests.vectors import cases


@pytest.mark.parametrize("case", cases("mcq_grading"), ids=lambda case: case["name"])
def test_a_completion_is_graded_as_in_the_reference_run(case: dict[str, Any]) -> None:
    verdict = MultipleChoice().check(case["input"]["text"], case["input"]["truth"], {})
    assert isinstance(verdict, Reward)
    assert {
        "score": verdict.value,
        "acc": float(verdict.correct),
        "pred": verdict.parsed,
        "format_ok": verdict.format_ok,
    } == case["expected"]
