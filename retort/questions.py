"""The questions of a data file: read by the trainer, and by the command line before anything is started."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from retort.config import ConfigError, MissingDependencyError, RunConfig


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One question of a data file."""

    index: int
    """Position in the file, from 0."""
    messages: list[dict[str, str]]
    """The chat up to and including the user turn that asks."""
    answer: str
    data_source: str
    """Names the metrics that the question counts in."""


class _Row(msgspec.Struct):
    """A row as it stands in the file. Other keys are allowed and mean nothing here."""

    answer: str
    messages: list[dict[str, str]] = []
    prompt: str = ""
    system: str = ""
    data_source: str = ""
    dataset: str = ""


def load_questions(path: Path | str) -> list[Question]:
    """Read a file of questions: Parquet if it is called so, else JSON Lines.

    A row holds `answer` and either `messages`, or `prompt` with an optional `system`. The data source is
    `data_source`, else `dataset`, else the file's name without its ending. docs/data.md shows it.
    Raises ConfigError, naming file, line and what is wrong.
    """
    path = Path(path)
    is_parquet = path.suffix == ".parquet"
    place = "row" if is_parquet else "line"
    try:
        rows = _parquet_rows(path) if is_parquet else _lines(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the data file: {error.strerror or error}.") from None
    questions: list[Question] = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            questions.append(_question(row, len(questions), default_source=path.stem))
        except (msgspec.DecodeError, ValueError) as error:
            hint = " Write it as text, in quotes." if "got `int`" in str(error) or "got `float`" in str(error) else ""
            raise ConfigError(f"{path}, {place} {number}: {error}{hint}") from None
    if not questions:
        raise ConfigError(f"{path}: the data file is empty; expected a question in each {place}.")
    return questions


def questions_of(config: RunConfig) -> tuple[list[Question], list[Question]]:
    """The training and the validation questions of a run. Raises ConfigError also where there are too few of them."""
    train, validation = load_questions(config.data.train), load_questions(config.data.validation)
    if len(train) < config.trainer.groups_per_step:
        raise ConfigError(
            f"{config.data.train} has {len(train)} questions, fewer than trainer.groups_per_step = "
            f"{config.trainer.groups_per_step}. Set that, and trainer.groups_per_update, to {len(train)} or less."
        )
    return train, validation[: config.validation.max_questions or None]


def asked_in_both(train: Sequence[Question], validation: Sequence[Question]) -> int:
    """How many validation questions are training questions too, word for word."""
    trained = {_wording(question) for question in train}
    return sum(_wording(question) in trained for question in validation)


def question_text(question: Question) -> str:
    """What the user asks, options included."""
    return question.messages[-1]["content"]


def _wording(question: Question) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in question.messages)


def _lines(path: Path) -> Sequence[bytes | dict[str, Any]]:
    return path.read_bytes().splitlines()


def _parquet_rows(path: Path) -> Sequence[bytes | dict[str, Any]]:
    """The columns that mean something here, row by row. A null is a value that is not there."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError(f"{path}: reading Parquet needs pyarrow, of the extra `trainer`.") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _Row.__struct_fields__]
            rows = file.read(columns).to_pylist()
    except arrow.ArrowInvalid as error:
        raise ConfigError(f"{path}: not a Parquet file: {error}") from None
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _question(data: bytes | dict[str, Any], index: int, *, default_source: str) -> Question:
    row = msgspec.json.decode(data, type=_Row) if isinstance(data, bytes) else msgspec.convert(data, _Row)
    if not row.answer:
        raise ValueError("`answer` is empty; the checker has nothing to compare a completion with.")
    messages = row.messages or _messages_from_prompt(row)
    for message in messages:
        if message.keys() != {"role", "content"}:
            raise ValueError(f"a message has the keys {sorted(message)}; expected `role` and `content`.")
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is from {messages[-1]['role']!r}; expected the user's question.")
    return Question(
        index=index,
        messages=messages,
        answer=row.answer,
        data_source=row.data_source or row.dataset or default_source,
    )


def _messages_from_prompt(row: _Row) -> list[dict[str, str]]:
    if not row.prompt:
        raise ValueError("neither `messages` nor `prompt` is there; one of them has to ask the question.")
    system = [{"role": "system", "content": row.system}] if row.system else []
    return [*system, {"role": "user", "content": row.prompt}]
