import pytest

from services.trainer.teacher_prompt import strip_thinking, teacher_messages, teacher_user_turn


def test_a_demonstration_stands_between_the_question_and_the_instruction() -> None:
    assert teacher_user_turn("Q", "S") == "Q\nCorrect solution:\n\nS\n\nCorrectly solve the original question."


def test_a_demonstration_makes_feedback_unnecessary() -> None:
    assert teacher_user_turn("Q", "S", "bad") == teacher_user_turn("Q", "S")


@pytest.mark.parametrize("feedback", [None, "", " \n"])
def test_with_neither_it_is_the_plain_question(feedback: str | None) -> None:
    assert teacher_user_turn("Q", None, feedback) == "Q"


def test_braces_in_a_demonstration_are_text() -> None:
    assert "\n\n{x} {0} %s\n\n" in teacher_user_turn("Q", "{x} {0} %s")


def test_only_the_last_message_changes() -> None:
    messages = [{"role": "system", "content": "\nRules.\n"}, {"role": "user", "content": "Q"}]
    assert teacher_messages(messages, "S") == [
        {"role": "system", "content": "\nRules.\n"},
        {"role": "user", "content": teacher_user_turn("Q", "S")},
    ]
    assert messages[1]["content"] == "Q"


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("<think>why\nso</think>\n\nB", "B"),
        ("why so</think> B", "B"),
        ("a<think>x</think>b<think>y</think>c", "abc"),
        ("<think>never closed B", "<think>never closed B"),
        ("B", "B"),
    ],
)
def test_closed_thinking_is_stripped(completion: str, kept: str) -> None:
    assert strip_thinking(completion) == kept
