"""JSON that has to fit a schema."""

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar, NoReturn

from services.reward.checkers import Checker, Example, Limits, Reward, Unscorable, Verdict, quoted

FENCES = ("```json", "```")


class JsonSchema(Checker):
    """Reward 1 if the completion is JSON that the schema accepts, else 0; unscorable if it cannot be told.

    The JSON is the text in the last fenced block if there is one, else the whole completion. Patterns of the
    schema are matched in linear time, and references to other documents are not followed.
    """

    name: ClassVar[str] = "json_schema"
    version: ClassVar[str] = "2"
    description: ClassVar[str] = "Parses the completion (or its last fenced block) as JSON and validates it."
    accepts: ClassVar[str] = "a JSON Schema (draft 4, 6, 7, 2019-09 or 2020-12) as JSON"
    examples = (
        Example('{"symbol": "He"}', '{"type": "object", "required": ["symbol"]}', 1.0),
        Example("He", '{"type": "object", "required": ["symbol"]}', 0.0),
    )
    deterministic: ClassVar[bool] = True
    limits: ClassVar[Limits] = Limits(seconds=2.0)

    def prepare(self) -> None:
        _validator({})

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        try:
            validator = _validator(json.loads(answer, parse_float=_finite, parse_constant=_refuse))
        # The library has a class of its own for every defect of a schema, and all of them are ValueErrors.
        except (ValueError, TypeError, RecursionError) as error:
            return Unscorable(reason=f"answer = {quoted(answer)} is no JSON Schema: {str(error)[:200]}")
        text, rule = _json_text(completion)
        try:
            value = json.loads(text, parse_float=_finite, parse_constant=_refuse)
            problem = next((error.message for error in validator.iter_errors(value)), "")
        except json.JSONDecodeError as error:
            return _reward(text, rule, is_json=False, problem=f"no JSON: {str(error)[:200]}")
        except (ValueError, RecursionError) as error:
            # JSON perhaps, but with a number, a text or a depth that this machine does not hold.
            return Unscorable(reason=f"completion = {quoted(text)} cannot be read: {str(error)[:200]}")
        return _reward(text, rule, is_json=True, problem=problem)


def _reward(text: str, rule: str, *, is_json: bool, problem: str) -> Reward:
    return Reward(
        value=0.0 if problem else 1.0,
        correct=not problem,
        parsed=text,
        format_ok=is_json,
        rule=rule,
        explanation=quoted(problem) if problem else "the schema accepts it",
    )


def _json_text(completion: str) -> tuple[str, str]:
    for fence in FENCES:
        before, found, _ = completion.rpartition("\n```")
        _, opened, inside = before.rpartition(fence)
        if found and opened:
            return inside.strip(), "fenced_block"
    return completion.strip(), "whole_text"


def _validator(schema: Any) -> Any:
    import jsonschema_rs

    return jsonschema_rs.validator_for(
        schema, retriever=_refuse_reference, pattern_options=jsonschema_rs.RegexOptions()
    )


def _refuse_reference(uri: str) -> NoReturn:
    raise ValueError(f"reference to another document: {uri}")


def _finite(number: str) -> float:
    """The library would take an infinity for null."""
    value = float(number)
    if not isfinite(value):
        raise ValueError(f"{quoted(number)} is too large")
    return value


def _refuse(constant: str) -> NoReturn:
    raise json.JSONDecodeError(f"{constant} is not JSON", constant, 0)
