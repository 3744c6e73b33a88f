import re

from hypothesis import given
from hypothesis import strategies as st

from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.mcq import MultipleChoice

PIECES = st.sampled_from(["<answer>", "</answer>", "<ANSWER>", "A", "B", "(B)", " ", "\n", "\r\n", "\u200b", "text"])


def graded(completion: str, answer: str = "B") -> Reward:
    verdict = MultipleChoice().check(completion, answer, {})
    assert isinstance(verdict, Reward)
    return verdict


def test_the_verdict_says_what_was_read_and_by_which_rule() -> None:
    assert graded("<reasoning>...</reasoning>\n<answer>\nC\n</answer>") == Reward(
        value=0.0,
        correct=False,
        parsed="C",
        format_ok=True,
        rule="last_answer_tag",
        explanation="read 'C', the answer is 'B'",
    )


def test_without_a_tag_the_whole_text_counts() -> None:
    assert (graded(" B\n").value, graded(" B\n").rule) == (1.0, "whole_text")
    assert graded("The answer is B").parsed == "The answer is B"


def test_the_explanation_of_a_long_text_is_short() -> None:
    assert len(graded("x" * 1_000_000).explanation) < 100


def test_an_empty_answer_is_unscorable_although_an_empty_completion_would_equal_it() -> None:
    assert isinstance(MultipleChoice().check("<answer></answer>", "", {}), Unscorable)


@given(st.lists(PIECES).map("".join))
def test_any_mixture_of_tags_is_read_by_the_one_rule(completion: str) -> None:
    parsed = re.split("</answer>", re.split("<answer>", completion)[-1])[0].strip()
    verdict = graded(completion)
    assert (verdict.parsed, verdict.correct, verdict.value) == (parsed, parsed == "B", float(parsed == "B"))


@given(st.text())
def test_any_text_is_graded(completion: str) -> None:
    assert graded(completion).value in (0.0, 1.0)
