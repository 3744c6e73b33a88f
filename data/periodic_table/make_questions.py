"""Write the periodic-table questions: multiple choice, four options, in the prompt format of SciKnowEval.

    python -m data.periodic_table.make_questions

One seed fixes every byte of `train.jsonl` and `validation.jsonl`. The facts are shared between the two files; what
validation measures unseen is the question: no (family, element, set of options) of it occurs in training.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SEED = 20
NUM_TRAIN_DRAWN = 2000
NUM_VALIDATION_DRAWN = 128
DATA_SOURCE = "periodic_table"
LETTERS = "ABCD"
SYSTEM_PROMPT = "Reason inside <reasoning> tags, then give one letter inside <answer> tags."
CLOSING = "Please reason step by step."


class Element(NamedTuple):
    name: str
    symbol: str
    number: str
    """Atomic number; a string, because questions only ever print it."""


# Symbols and names in the order of atomic numbers.
TABLE = """
H hydrogen He helium
Li lithium Be beryllium B boron C carbon N nitrogen O oxygen F fluorine Ne neon
Na sodium Mg magnesium Al aluminium Si silicon P phosphorus S sulfur Cl chlorine Ar argon
K potassium Ca calcium Sc scandium Ti titanium V vanadium Cr chromium Mn manganese Fe iron Co cobalt Ni nickel
Cu copper Zn zinc Ga gallium Ge germanium As arsenic Se selenium Br bromine Kr krypton
"""
ELEMENTS = tuple(
    Element(name, symbol, str(number))
    for number, (symbol, name) in enumerate(zip(TABLE.split()[::2], TABLE.split()[1::2], strict=True), start=1)
)


@dataclass(frozen=True)
class Family:
    """One kind of question: given one property of an element, find another."""

    name: str
    given: str
    sought: str
    question: str
    statement: str
    """What a right completion says; `{given}` and `{sought}` are filled in."""


FAMILIES = (
    Family("symbol", "name", "symbol", "What is the symbol of {given}?", "The symbol of {given} is {sought}"),
    Family(
        "element_of_symbol",
        "symbol",
        "name",
        "Which element has the symbol {given}?",
        "The element with the symbol {given} is {sought}",
    ),
    Family(
        "number",
        "name",
        "number",
        "What is the atomic number of {given}?",
        "The atomic number of {given} is {sought}",
    ),
    Family(
        "element_of_number",
        "number",
        "name",
        "Which element has the atomic number {given}?",
        "The element with the atomic number {given} is {sought}",
    ),
)
# The tiny model knows atomic numbers but cannot find one among the options, which no short run mends. So questions for
# a number are drawn, and held out where they belong, but not asked.
ASKED = tuple(family for family in FAMILIES if family.sought != "number")


@dataclass(frozen=True)
class MultipleChoice:
    """One question with its four options; `options[answer_index]` is right."""

    family: Family
    given: str
    options: tuple[str, ...]
    answer_index: int

    @property
    def answer(self) -> str:
        return LETTERS[self.answer_index]

    @property
    def key(self) -> tuple[str, str, frozenset[str]]:
        """What makes two questions the same one, whatever the order of their options."""
        return self.family.name, self.given, frozenset(self.options)

    @property
    def text(self) -> str:
        lines = [f"{letter}: {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
        return "\n".join([self.family.question.format(given=self.given), "", *lines, CLOSING])

    def statement(self, option_index: int) -> str:
        """The sentence of a completion that settles on one option, with the option's letter."""
        sought = self.options[option_index]
        return f"{self.family.statement.format(given=self.given, sought=sought)} ({LETTERS[option_index]})."

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": self.text}]

    def row(self) -> dict[str, object]:
        return {"messages": self.messages, "answer": self.answer, "data_source": DATA_SOURCE}


def draw_question(rng: random.Random, families: tuple[Family, ...] = FAMILIES) -> MultipleChoice:
    """A random question. Half of them take the wrong options from near neighbours in the periodic table."""
    family = rng.choice(families)
    index = rng.randrange(len(ELEMENTS))
    near = rng.random() < 0.5
    others = [i for i in range(len(ELEMENTS)) if i != index and (not near or abs(i - index) <= 8)]
    chosen = [index, *rng.sample(others, k=len(LETTERS) - 1)]
    rng.shuffle(chosen)
    return MultipleChoice(
        family=family,
        given=getattr(ELEMENTS[index], family.given),
        options=tuple(getattr(ELEMENTS[i], family.sought) for i in chosen),
        answer_index=chosen.index(index),
    )


def make_splits() -> tuple[list[MultipleChoice], list[MultipleChoice]]:
    """Training and validation questions of all families, all different."""
    questions = _different_questions(random.Random(SEED))
    validation = [next(questions) for _ in range(NUM_VALIDATION_DRAWN)]
    return [next(questions) for _ in range(NUM_TRAIN_DRAWN)], validation


def asked(questions: list[MultipleChoice]) -> list[MultipleChoice]:
    """Those that go into the files."""
    return [question for question in questions if question.family in ASKED]


def _different_questions(rng: random.Random) -> Iterator[MultipleChoice]:
    seen = set()
    while True:
        question = draw_question(rng)
        if question.key not in seen:
            seen.add(question.key)
            yield question


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and validation.jsonl.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="directory to write to")
    directory = parser.parse_args().output
    for name, questions in zip(("train", "validation"), make_splits(), strict=True):
        lines = [json.dumps(question.row(), ensure_ascii=False) + "\n" for question in asked(questions)]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
