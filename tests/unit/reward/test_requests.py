import pytest

from services.reward.requests import LONGEST_VALUE, malformed, too_large
from services.reward.scoring import Item


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([], "items: empty; send at least one item"),
        (["a", ""], "items[1].id: empty; give every item an id"),
        (["a", "b", "a"], "items[2].id: 'a' is also the id of items[0]"),
        (["a", "x" * 257], "items[1].id: longer than 256 characters"),
        (["a", "b"], ""),
    ],
)
def test_a_problem_begins_with_its_field(ids: list[str], problem: str) -> None:
    assert malformed([Item(item_id, "mcq", "", "") for item_id in ids]) == problem


def test_what_is_too_large_is_named() -> None:
    assert too_large("mcq", {"a": "b"}, {"c": "d"}) == ""
    assert too_large("x" * 257, {}, {}) == "checker: longer than 256 characters"
    assert too_large("mcq", {str(n): "" for n in range(65)}, {}) == "metadata: 65 entries are more than 64"
    assert too_large("mcq", {}, {"a": "x" * (LONGEST_VALUE + 1)}).startswith("options: an entry is longer than 256")
