import pytest

from services.reward.answer_text import last_answer_tag


@pytest.mark.parametrize(
    ("completion", "text", "rule"),
    [
        ("<answer>1</answer> <answer> 2 </answer>", "2", "last_answer_tag"),
        ("<answer>3", "3", "last_answer_tag"),
        (" 4 </answer> more", "4", "whole_text"),
        ("", "", "whole_text"),
    ],
)
def test_the_text_in_the_last_tag_counts(completion: str, text: str, rule: str) -> None:
    assert last_answer_tag(completion) == (text, rule)
