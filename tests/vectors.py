"""Numeric conformance cases: inputs and expected outputs of every formula, one file for all sections.

The file is $RETORT_VECTORS if set, else ../shared/spec/vectors.json beside the checkout if there is one, else the
project's own vectors.json beside this module. A section is a list of cases {"name", "input", "expected", ...}.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

_OWN_FILE = Path(__file__).with_name("vectors.json")
_SHARED_FILE = Path(__file__).parents[2] / "shared" / "spec" / "vectors.json"
_NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_TEXT_SECTIONS = {"mcq_grading", "teacher_user_turn"}


def path() -> Path:
    """The file in use."""
    if chosen := os.environ.get("RETORT_VECTORS"):
        return Path(chosen)
    return _SHARED_FILE if _SHARED_FILE.exists() else _OWN_FILE


def sections() -> set[str]:
    """Names of the sections that hold cases."""
    return set(_read(path())) - {"meta"}


def cases(section: str) -> list[dict[str, Any]]:
    """The cases of a section, in order; none if the file lacks it. NaN and infinities are numbers again."""
    found = _read(path()).get(section, [])
    return found if section in _TEXT_SECTIONS else _numbers(found)


def each_case(section: str) -> pytest.MarkDecorator:
    """Run a test once for each case of a section; the argument is `case`, the id its name."""
    found = cases(section)
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


@functools.cache
def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value
