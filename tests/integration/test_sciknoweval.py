"""The real SciKnowEval chemistry questions, which are not in this repository.

They are looked for in $RETORT_SCIKNOWEVAL, then in ../shared/data/sciknoweval/chemistry beside the repository.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.prepare import CHECKSUMS, SYSTEM, read_split
from retort.questions import load_questions

BESIDE = Path(__file__).parents[3] / "shared" / "data" / "sciknoweval" / "chemistry"
QUESTIONS = Path(os.environ.get("RETORT_SCIKNOWEVAL", BESIDE))

pytestmark = pytest.mark.skipif(
    not QUESTIONS.is_dir(), reason=f"no SciKnowEval questions in {QUESTIONS}; set RETORT_SCIKNOWEVAL to their directory"
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chemistry")
    assert main(["prepare", "sciknoweval", "--source", str(QUESTIONS), "--out", str(out)]) == 0
    return out


def test_the_split_is_1890_and_210_questions(prepared: Path) -> None:
    assert len(load_questions(prepared / "train.jsonl")) == 1890
    assert len(load_questions(prepared / "test.jsonl")) == 210


def test_the_checksums_are_written_beside_the_files(prepared: Path) -> None:
    lines = [f"{digest}  {name}" for name, digest in CHECKSUMS["chemistry"].items()]
    assert (prepared / "SHA256SUMS").read_text().splitlines() == lines


def test_every_prompt_is_the_system_text_and_the_question_verbatim(prepared: Path) -> None:
    rows = [json.loads(line) for line in (prepared / "train.jsonl").read_text().splitlines()]
    for row, question in zip(rows, load_questions(prepared / "train.jsonl"), strict=True):
        expected = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]
        assert question.messages == expected
        assert question.data_source == "sciknoweval"


def test_the_answers_are_spread_as_in_the_published_files(prepared: Path) -> None:
    train, test = (load_questions(prepared / name) for name in ("train.jsonl", "test.jsonl"))
    assert Counter(question.answer for question in train) == {"A": 462, "B": 463, "C": 485, "D": 480}
    assert Counter(question.answer for question in test) == {"A": 64, "B": 47, "C": 57, "D": 42}


def test_the_union_of_all_questions_gives_the_same_split(prepared: Path, tmp_path: Path) -> None:
    train, test = read_split(str(QUESTIONS), "chemistry")
    union = tmp_path / "chemistry.json"
    union.write_text(json.dumps(sorted(train + test, key=lambda row: row["idx"])))
    assert main(["prepare", "sciknoweval", "--source", str(union), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == (prepared / "test.jsonl").read_bytes()


def test_upstream_rows_give_the_same_split(tmp_path: Path) -> None:
    """Upstream's rows are rebuilt from the questions: the conversion then has to find its way back to the byte."""
    train, test = read_split(str(QUESTIONS), "chemistry")
    rows = [{"choices": {}, "question": "", "answerKey": "", "type": "", "domain": "Biology", "details": {}}]
    for row in sorted(train + test, key=lambda row: row["idx"]):
        question, _, rest = row["prompt"].rpartition("\n\n")
        options = [line.split(": ", 1) for line in rest.split("\n")[:-1]]
        choices = {"label": [label for label, _ in options], "text": [text for _, text in options]}
        asked = {"question": question, "choices": choices, "answerKey": row["answer"]}
        rows.append(asked | {"type": "mcq-4-choices", "domain": "Chemistry", "details": {"level": "L3"}})
    upstream = tmp_path / "sciknoweval_test_v2.jsonl"
    upstream.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["prepare", "sciknoweval", "--source", str(upstream), "--out", str(tmp_path / "out")]) == 0


def test_one_changed_letter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        text = (QUESTIONS / name).read_text()
        (tmp_path / name).write_text(text.replace('"answer":"A"', '"answer":"B"', 1) if name == "test.jsonl" else text)
    assert main(["prepare", "sciknoweval", "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "test.jsonl has sha256" in error
    assert "train.jsonl has sha256" not in error
