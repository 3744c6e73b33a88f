from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from retort.config import ConfigError
from retort.questions import Question, asked_in_both, load_questions, question_text, questions_of
from tests.training import a_config

GOOD = '{"messages": [{"role": "user", "content": "Q?"}], "answer": "B", "data_source": "toy"}'


def a_file(directory: Path, *lines: str) -> Path:
    path = directory / "quiz.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        load_questions(path)
    return str(raised.value)


def test_a_row_with_messages_is_taken_as_it_stands(tmp_path: Path) -> None:
    assert load_questions(a_file(tmp_path, GOOD)) == [
        Question(index=0, messages=[{"role": "user", "content": "Q?"}], answer="B", data_source="toy")
    ]


def test_prompt_and_system_become_two_messages_and_other_keys_are_ignored(tmp_path: Path) -> None:
    row = '{"idx": 7, "system": "S", "prompt": "P\\n\\nA: 1", "answer": "C", "dataset": "sciknoweval", "elo": 1500}'
    [question] = load_questions(a_file(tmp_path, row))
    assert question.messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "P\n\nA: 1"}]
    assert question.data_source == "sciknoweval"
    assert question_text(question) == "P\n\nA: 1"


def test_without_a_data_source_the_file_names_it(tmp_path: Path) -> None:
    [question] = load_questions(a_file(tmp_path, '{"prompt": "P", "answer": "A"}'))
    assert question.data_source == "quiz"


def test_the_index_counts_from_zero_in_file_order(tmp_path: Path) -> None:
    questions = load_questions(a_file(tmp_path, GOOD, GOOD, GOOD))
    assert [question.index for question in questions] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": P, "answer": "A"}', "JSON is malformed"),
        ('{"prompt": "P", "answer": ', "Input data was truncated"),
        ('["P", "A"]', "Expected `object`, got `array`"),
        ('{"prompt": "P"}', "missing required field `answer`"),
        ('{"prompt": "P", "answer": 2}', "Expected `str`, got `int` - at `$.answer` Write it as text, in quotes."),
        ('{"prompt": "P", "answer": ""}', "`answer` is empty"),
        ('{"answer": "A"}', "neither `messages` nor `prompt`"),
        ('{"messages": [{"role": "user"}], "answer": "A"}', "keys ['role']"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "answer": "A"}', "is from 'assistant'"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = a_file(tmp_path, GOOD, line, GOOD)
    message = error_of(path)
    assert message.startswith(f"{path}, line 2: ")
    assert complaint in message


def test_a_missing_file_and_an_empty_file_are_configuration_errors(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.jsonl").endswith("cannot read the data file: No such file or directory.")
    assert "the data file is empty" in error_of(a_file(tmp_path))


def test_the_lines_that_the_documentation_shows_are_questions(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = page.partition("```json\n")[2].partition("```")[0].splitlines()
    questions = load_questions(a_file(tmp_path, *lines))
    assert [(question.answer, question.data_source) for question in questions] == [
        ("B", "gases"),
        ("18.015 g/mol", "quiz"),
        ("B", "quiz"),
    ]


def a_parquet_file(directory: Path, **columns: list[object]) -> Path:
    path = directory / "quiz.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_mean_what_the_same_lines_mean(tmp_path: Path) -> None:
    path = a_parquet_file(
        tmp_path,
        messages=[[{"role": "user", "content": "Q?"}], None],
        prompt=[None, "P"],
        system=[None, "S"],
        answer=["B", "C"],
        elo=[1500, 1500],
    )
    lines = a_file(
        tmp_path,
        '{"messages": [{"role": "user", "content": "Q?"}], "answer": "B"}',
        '{"prompt": "P", "system": "S", "answer": "C"}',
    )
    assert load_questions(path) == load_questions(lines)


def test_what_is_wrong_in_a_parquet_file_is_named_by_row(tmp_path: Path) -> None:
    path = a_parquet_file(tmp_path, prompt=["P", "P"], answer=["A", None])
    assert error_of(path) == f"{path}, row 2: Object missing required field `answer`"
    path = a_parquet_file(tmp_path, prompt=["P"], answer=[2])
    assert error_of(path) == f"{path}, row 1: Expected `str`, got `int` - at `$.answer` Write it as text, in quotes."


def test_a_parquet_file_without_rows_and_one_that_is_none_are_configuration_errors(tmp_path: Path) -> None:
    path = a_parquet_file(tmp_path, prompt=[], answer=[])
    assert error_of(path) == f"{path}: the data file is empty; expected a question in each row."
    path.write_text(GOOD)
    assert error_of(path).startswith(f"{path}: not a Parquet file: ")
    assert "No such file" in error_of(tmp_path / "none.parquet")


def test_blank_lines_are_no_questions_but_count_in_line_numbers(tmp_path: Path) -> None:
    path = a_file(tmp_path, GOOD, "", GOOD, "   ")
    assert [question.index for question in load_questions(path)] == [0, 1]
    assert error_of(a_file(tmp_path, GOOD, "", "{")).startswith(f"{path}, line 3: ")


def test_questions_asked_in_both_files_are_counted_by_their_wording(tmp_path: Path) -> None:
    train = load_questions(a_file(tmp_path, '{"prompt": "P", "answer": "A"}', '{"prompt": "Q", "answer": "A"}'))
    validation = load_questions(
        a_file(
            tmp_path,
            '{"messages": [{"role": "user", "content": "Q"}], "answer": "B"}',
            '{"system": "S", "prompt": "P", "answer": "A"}',
        )
    )
    assert asked_in_both(train, validation) == 1


def test_a_run_validates_with_the_first_questions_if_it_says_so(tmp_path: Path) -> None:
    file = str(a_file(tmp_path, GOOD, GOOD, GOOD))
    config = a_config(
        data={"train": file, "validation": file},
        validation={"max_questions": 2},
        trainer={"steps": 1, "groups_per_step": 3, "groups_per_update": 3},
    )
    train, validation = questions_of(config)
    assert (len(train), len(validation)) == (3, 2)
