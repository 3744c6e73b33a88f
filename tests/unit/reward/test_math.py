import pytest

from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.math import Math


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"$\boxed{\frac{2}{4}}$", "0.5", 1.0),
        ("The answer is $(x+1)^2$.", "x^2+2x+1", 1.0),
        (r"$\{2, 1\}$", r"\{1, 2\}", 1.0),
        ("$(1, 2]$", "$(1, 2]$", 1.0),
        ("$(1, 2)$", "$(1, 2]$", 0.0),
        ("no idea", "5", 0.0),
    ],
)
def test_what_is_equal_in_mathematics_is_right(completion: str, answer: str, value: float) -> None:
    verdict = Math().check(completion, answer, {})
    assert isinstance(verdict, Reward)
    assert verdict.value == value


def test_an_answer_without_an_expression_is_unscorable() -> None:
    assert isinstance(Math().check("5", "", {}), Unscorable)
