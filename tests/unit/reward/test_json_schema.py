import pytest

from services.reward.checkers import Reward, Unscorable
from services.reward.checkers.json_schema import JsonSchema

SCHEMA = '{"type": "object", "properties": {"z": {"type": "integer"}}, "required": ["z"]}'


@pytest.mark.parametrize(
    ("completion", "value", "format_ok"),
    [
        ('{"z": 2}', 1.0, True),
        ('It is\n```json\n{"z": 2}\n```\n', 1.0, True),
        ('{"z": "2"}', 0.0, True),
        ("{}", 0.0, True),
        ("z = 2", 0.0, False),
        ('{"z": NaN}', 0.0, False),
    ],
)
def test_the_completion_has_to_fit_the_schema(completion: str, value: float, format_ok: bool) -> None:
    verdict = JsonSchema().check(completion, SCHEMA, {})
    assert isinstance(verdict, Reward)
    assert (verdict.value, verdict.format_ok) == (value, format_ok)


@pytest.mark.parametrize(
    "value", ["9" * 5000, r'"\ud800"', "1e999", "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000]
)
def test_json_that_python_cannot_hold_is_unscorable_and_never_0(value: str) -> None:
    verdict = JsonSchema().check(value, '{"type": ["number", "string", "array", "object"]}', {})
    assert isinstance(verdict, Unscorable)
    assert "cannot be read" in verdict.reason


@pytest.mark.parametrize(
    "schema", ["", "{", '{"type": "atom"}', '{"$ref": "http://127.0.0.1:9/"}', '{"$ref": "file:///etc/passwd"}', "5"]
)
def test_what_is_no_schema_of_its_own_is_unscorable(schema: str) -> None:
    assert isinstance(JsonSchema().check("{}", schema, {}), Unscorable)
