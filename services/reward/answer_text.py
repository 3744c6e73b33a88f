"""Where in a completion the answer stands."""


def last_answer_tag(completion: str) -> tuple[str, str]:
    """The text after the last `<answer>`, up to the first `</answer>` after it, and the rule that found it.

    Without an opening tag the whole text counts, without a closing one all that follows.
    """
    _, tag, after = completion.rpartition("<answer>")
    return after.partition("</answer>")[0].strip(), "last_answer_tag" if tag else "whole_text"
