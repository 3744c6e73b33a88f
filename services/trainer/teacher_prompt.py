"""What the teacher reads before it scores a completion: the question, with a sibling's solution beneath.

The joins are those of the reference run (after lasgroup/SDPO), character for character. The answer key is never shown.
"""

import re
from collections.abc import Mapping, Sequence

_CLOSED_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_TEXT_BEFORE_LONE_CLOSING_TAG = re.compile(r"\A.*?</think>\s*", re.DOTALL)


def teacher_user_turn(question: str, demonstration: str | None = None, feedback: str | None = None) -> str:
    """The last user turn of the teacher's prompt.

    Feedback is used only where there is no demonstration, and blank feedback is none. With neither it is the
    plain question.
    """
    if demonstration is not None:
        hint = f"Correct solution:\n\n{demonstration}"
    elif feedback is not None and feedback.strip():
        hint = f"The following is feedback from your unsuccessful earlier attempt:\n\n{feedback}"
    else:
        return question
    return f"{question}\n{hint}\n\nCorrectly solve the original question."


def teacher_messages(messages: Sequence[Mapping[str, str]], demonstration: str) -> list[dict[str, str]]:
    """A conversation whose last turn asks the question, with the demonstration put into that turn."""
    *before, question = messages
    turn = teacher_user_turn(question["content"], demonstration)
    return [*(dict(message) for message in before), {"role": "user", "content": turn}]


def strip_thinking(completion: str) -> str:
    """A completion without closed think blocks and without what stands before a lone closing tag."""
    return _TEXT_BEFORE_LONE_CLOSING_TAG.sub("", _CLOSED_THINKING.sub("", completion))
