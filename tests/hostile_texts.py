"""Texts that have broken parsers before, for hypothesis."""

from hypothesis import strategies as st

HOSTILE = st.sampled_from(
    [
        "", "\x00", "\ud800", "é", "١", "NaN", "-inf", "1e999", "9" * 5000, "(a+)+$", "[" * 5000, "{" * 5000, "\\", "$",
        "<answer>", "</answer>", "\\boxed{", "}", "```", "```json\n", '{"a": NaN}', '{"$ref": "http://x.invalid/"}',
        "1,000", "km/h", "m^999", "answer is ", "A", "B", "(", ")", "*" * 50, "\u202e", "null", "true", "[]", "{}",
    ]
)  # fmt: skip
TEXT = st.one_of(st.text(st.characters(codec=None), max_size=60), st.lists(HOSTILE, max_size=6).map("".join))
