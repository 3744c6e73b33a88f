import json
from pathlib import Path
from typing import Any

import pytest

from retort.cli.__main__ import main
from retort.cli.prepare import SYSTEM, checksum_problem, convert, encode, split
from retort.questions import load_questions


def an_upstream_row(number: int = 0, **fields: Any) -> dict[str, Any]:
    known = {
        "prompt": {"default": "Please directly give the answer."},
        "question": f"What is question {number}?",
        "choices": {"label": ["A", "B", "C", "D"], "text": ["w", "x", "y", "z"]},
        "answerKey": "B",
        "type": "mcq-4-choices",
        "domain": "Physics",
        "details": {"level": "L3", "subtask": "any"},
    }
    return known | fields


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_question_of_upstream_is_asked_as_in_the_published_run() -> None:
    (row,) = convert([an_upstream_row(7)], "physics")
    assert row["prompt"] == "What is question 7?\n\nA: w\nB: x\nC: y\nD: z\nPlease reason step by step."
    assert (row["system"], row["answer"], row["idx"]) == (SYSTEM, "B", 0)


def test_only_multiple_choice_questions_of_the_domain_and_of_level_3_are_taken() -> None:
    others = [
        an_upstream_row(1, domain="Biology"),
        an_upstream_row(2, details={"level": "L2"}),
        an_upstream_row(3, type="true_or_false"),
        an_upstream_row(4, type="mcq-2-choices"),
    ]
    assert [row["description"][:19] for row in convert(others, "physics")] == ["What is question 4?"]


def test_a_tenth_becomes_the_test_questions_and_the_order_is_that_of_seed_42() -> None:
    # numpy.random.default_rng(42).permutation(10) is 5 6 0 7 3 2 4 9 1 8.
    train, test = split([{"idx": index} for index in range(10)])
    assert [row["idx"] for row in test] == [5]
    assert [row["idx"] for row in train] == [6, 0, 7, 3, 2, 4, 9, 1, 8]


def test_a_line_is_spelled_as_pandas_spells_it() -> None:
    assert encode([{"idx": 1, "prompt": "g/mol in °C"}]) == b'{"idx":1,"prompt":"g\\/mol in \\u00b0C"}\n'


def test_a_domain_without_known_checksum_is_written_and_said_to_be_unverified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "upstream.jsonl", [an_upstream_row(number) for number in range(20)])
    out = tmp_path / "physics"
    assert main(["prepare", "sciknoweval", "--domain", "physics", "--source", str(source), "--out", str(out)]) == 0
    assert "Not verified: no checksum is known for physics." in capsys.readouterr().out
    assert len(load_questions(out / "train.jsonl")) == 18
    question = load_questions(out / "test.jsonl")[0]
    assert question.messages[0] == {"role": "system", "content": SYSTEM}
    assert (question.answer, question.data_source) == ("B", "sciknoweval")
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {"train.jsonl", "test.jsonl"}


def test_what_was_written_is_a_source_again(tmp_path: Path) -> None:
    source = write(tmp_path / "upstream.jsonl", [an_upstream_row(number) for number in range(20)])
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["prepare", "sciknoweval", "--domain", "physics"]
    assert main([*command, "--source", str(source), "--out", str(first)]) == 0
    assert main([*command, "--source", str(first), "--out", str(second)]) == 0
    assert (first / "train.jsonl").read_bytes() == (second / "train.jsonl").read_bytes()


def test_other_chemistry_questions_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [an_upstream_row(number, domain="Chemistry") for number in range(20)]
    source = write(tmp_path / "upstream.jsonl", rows)
    assert main(["prepare", "sciknoweval", "--source", str(source), "--out", str(tmp_path / "out")]) == 2
    problem = capsys.readouterr().err
    assert "not the chemistry questions of the published run: train.jsonl has sha256" in problem
    assert "instead of dc841dc92a16a6af" in problem
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expected JSON objects"),
        ("[1, 2]", "expected JSON objects"),
        ("question,answer\n", "neither a JSON array nor JSON Lines"),
        ('{"question": "Why?", "answer": "B"}\n', "question 1: not of SciKnowEval: idx, kind,"),
        ('{"choices": {}, "question": "Why?"}\n', "question 1: not of SciKnowEval: answerKey, type, domain, details"),
    ],
)
def test_a_file_of_something_else_is_told_in_words(
    content: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.json"
    source.write_text(content)
    assert main(["prepare", "sciknoweval", "--source", str(source), "--out", str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err


def test_a_directory_without_the_two_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "sciknoweval", "--source", str(tmp_path)]) == 2
    assert "neither train.json nor train.jsonl is there" in capsys.readouterr().err


def test_checksums_are_compared_only_where_they_are_known() -> None:
    sums = {"train.jsonl": "0" * 64, "test.jsonl": "1" * 64}
    assert checksum_problem(sums, "physics") == ""
    assert "test.jsonl has sha256 1111" in checksum_problem(sums, "chemistry")
