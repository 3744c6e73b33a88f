import pytest
from pydantic import ValidationError

from services.reward.http_messages import OpenRlhfBody, ScoreBody
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


ITEM: dict[str, object] = {"id": "1", "checker": "mcq", "completion": ""}
MANY = {str(n): 1 for n in range(65)}


@pytest.mark.parametrize(
    ("message", "body", "place", "problem"),
    [
        (ScoreBody, {"items": [{}] * 4096}, ("items", 0, "id"), "Field required"),
        (ScoreBody, {"items": [{}] * 4097}, ("items",), "4097 entries are more than 4096"),
        (ScoreBody, {"items": [ITEM | {"options": MANY}]}, ("items", 0, "options"), "65 entries are more than 64"),
        (ScoreBody, {"items": [ITEM | MANY]}, ("items", 0), "68 entries are more than 64"),
        (ScoreBody, MANY, (), "65 entries are more than 64"),
        (OpenRlhfBody, {"query": [1] * 4096, "prompts": [], "labels": []}, ("query", 0), "valid string"),
        (OpenRlhfBody, {"query": [""] * 4097, "prompts": [], "labels": []}, ("query",), "4097 entries"),
        (OpenRlhfBody, {"query": [], "prompts": [], "labels": [{}] * 4096}, ("labels", 0), "valid string"),
    ],
)
def test_a_body_of_many_mistakes_is_refused_at_the_first(
    message: type[ScoreBody | OpenRlhfBody], body: object, place: tuple[object, ...], problem: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        message.model_validate(body)
    first, *others = refused.value.errors()
    assert first["loc"] == place
    assert problem in first["msg"]
    # The fields of one item at most: a megabyte of mistakes must not become a gigabyte of errors.
    assert len(others) < 5
