"""docs/algorithm.md leads from every symbol to a line of code that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
LINES = re.findall(r"`([\w/.]+\.py)`: `([^`]+)`", PAGE)
FUNCTIONS = re.findall(r"`(\w+\.py)`, `(\w+)`", PAGE) + [
    (f"{module}.py", name)
    for module, name in re.findall(r"`(\w+)\.(\w+)`", PAGE)
    if (ROOT / "services" / "trainer" / f"{module}.py").exists() and name != "py"
]


def source(file: str) -> str:
    """Files of the page are relative to services/trainer/, unless they say where they are."""
    path = ROOT / file if "/" in file else ROOT / "services" / "trainer" / file
    return path.read_text(encoding="utf-8")


def test_every_symbol_of_the_table_has_its_line() -> None:
    table = PAGE.partition("| symbol |")[2].partition("\n\n")[0]
    assert len(table.splitlines()) - 2 == len(LINES) == 18


@pytest.mark.parametrize(("file", "line"), LINES)
def test_the_line_stands_in_the_file(file: str, line: str) -> None:
    assert line in [text.strip() for text in source(file).splitlines()]


@pytest.mark.parametrize(("file", "name"), FUNCTIONS)
def test_a_function_that_is_named_exists(file: str, name: str) -> None:
    assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", source(file), re.MULTILINE), f"{name} in {file}"
