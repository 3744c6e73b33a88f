"""The shipped questions are what their script writes, they are right, and validation is unseen in training."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "data" / "periodic_table"
USER_TURN = re.compile(
    r"(?P<question>.+\?)\n\nA: (?P<A>\w+)\nB: (?P<B>\w+)\nC: (?P<C>\w+)\nD: (?P<D>\w+)\nPlease reason step by step\."
)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def parts(row: dict[str, Any]) -> dict[str, str]:
    match = USER_TURN.fullmatch(row["messages"][-1]["content"])
    assert match, row
    return match.groupdict()


def test_the_script_writes_the_shipped_files_byte_by_byte(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.periodic_table.make_questions", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_there_are_1534_training_and_95_validation_questions() -> None:
    assert (len(rows("train")), len(rows("validation"))) == (1534, 95)


def test_no_validation_question_occurs_in_training_in_any_order_of_options() -> None:
    def keys(name: str) -> list[tuple[str, frozenset[str]]]:
        found = [parts(row) for row in rows(name)]
        return [(part["question"], frozenset(part[letter] for letter in "ABCD")) for part in found]

    assert not set(keys("train")) & set(keys("validation"))
    assert len(set(keys("train"))) == 1534
    assert len(set(keys("validation"))) == 95


@pytest.mark.parametrize("name", ["train", "validation"])
def test_every_question_has_four_different_options_and_names_its_source(name: str) -> None:
    for row in rows(name):
        assert len({parts(row)[letter] for letter in "ABCD"}) == 4
        assert [message["role"] for message in row["messages"]] == ["system", "user"]
        assert row["data_source"] == "periodic_table"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the symbol of sodium?", "Na"),
        ("Which element has the symbol Fe?", "iron"),
        ("Which element has the atomic number 8?", "oxygen"),
        ("Which element has the atomic number 36?", "krypton"),
    ],
)
def test_the_letter_of_the_answer_stands_before_the_right_option(question: str, answer: str) -> None:
    asked = [row for row in rows("train") if parts(row)["question"] == question]
    assert asked
    assert {parts(row)[row["answer"]] for row in asked} == {answer}


def test_the_symbol_of_an_element_leads_back_to_the_element() -> None:
    facts = {parts(row)["question"]: parts(row)[row["answer"]] for row in rows("train")}
    for question, answer in facts.items():
        if match := re.fullmatch(r"What is the symbol of (\w+)\?", question):
            assert facts.get(f"Which element has the symbol {answer}?", match[1]) == match[1]


def test_letters_are_balanced_so_that_a_constant_answer_is_chance() -> None:
    counts = Counter(row["answer"] for row in rows("train"))
    assert all(350 <= counts[letter] <= 410 for letter in "ABCD")
