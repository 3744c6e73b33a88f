import pytest

from services.reward.checkers import Reward, Unscorable, Verdict
from services.reward.checkers.exact_match import ExactMatch


def check(completion: str, answer: str, **options: str) -> Verdict:
    return ExactMatch().check(completion, answer, options)


@pytest.mark.parametrize(
    ("completion", "answer", "options", "value"),
    [
        (" NaCl\n", "NaCl", {}, 1.0),
        ("NaCl", " NaCl ", {}, 1.0),
        ("nacl", "NaCl", {}, 0.0),
        ("nacl", "NaCl", {"ignore_case": "true"}, 1.0),
        ("It is NaCl", "NaCl", {}, 0.0),
    ],
)
def test_completion_and_answer_must_be_equal(
    completion: str, answer: str, options: dict[str, str], value: float
) -> None:
    verdict = check(completion, answer, **options)
    assert isinstance(verdict, Reward)
    assert (verdict.value, verdict.correct, verdict.parsed) == (value, value == 1.0, completion.strip())


def test_an_option_with_a_wrong_value_is_named() -> None:
    verdict = check("a", "a", ignore_case="yes")
    assert verdict == Unscorable(reason="option ignore_case = 'yes'; exact_match takes true or false")


def test_an_empty_answer_is_unscorable() -> None:
    assert isinstance(check("", " "), Unscorable)
