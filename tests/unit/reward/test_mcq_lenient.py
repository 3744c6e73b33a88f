import pytest

from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.mcq_lenient import LenientMultipleChoice


@pytest.mark.parametrize(
    ("completion", "letter", "rule"),
    [
        ("<answer>(B)</answer>", "B", "answer_tag"),
        ("<answer>b</answer>", "B", "answer_tag"),
        ("<answer>**B**.</answer>", "B", "answer_tag"),
        ("<answer>B: helium</answer>", "B", "answer_tag"),
        (r"so \boxed{\text{C}}", "C", "boxed"),
        ("The answer is (B).", "B", "stated"),
        ("**Answer:** C", "C", "stated"),
        ("I choose option D", "D", "stated"),
        (" (a) ", "A", "whole_text"),
        ("A: helium", "A", "whole_text"),
        ("B</answer> I am sure.", "B", "whole_text"),
        ("\u3000B\u00a0", "B", "whole_text"),
        ("A: helium\nB: neon\nC: argon", "", "none"),
        ("<answer>Beryllium</answer>", "", "none"),
        ("An answer is needed", "", "none"),
        ("", "", "none"),
    ],
)
def test_the_first_rule_that_finds_a_letter_decides(completion: str, letter: str, rule: str) -> None:
    verdict = LenientMultipleChoice().check(completion, letter or "A", {})
    assert isinstance(verdict, Reward)
    assert (verdict.parsed, verdict.rule, verdict.correct) == (letter, rule, bool(letter))


@pytest.mark.parametrize("answer", ["", "AB", "1", "é"])
def test_an_answer_that_is_no_letter_is_unscorable(answer: str) -> None:
    assert isinstance(LenientMultipleChoice().check("A", answer, {}), Unscorable)
