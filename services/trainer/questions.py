"""The questions of a data file, and the prompts that they make."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from retort.config import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    try:
        rows = _parquet_rows(path) if is_parquet else _lines(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the data file: {error.strerror or error}.") from None
    if not rows:
        raise ConfigError(f"{path}: the data file is empty; expected a question in each {_place(is_parquet)}.")
    questions = []
    for index, row in enumerate(rows):
        try:
            questions.append(_question(row, index, default_source=path.stem))
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"{path}, {_place(is_parquet)} {index + 1}: {error}") from None
    return questions


def question_text(question: Question) -> str:
    """What the user asks, options included."""
    return question.messages[-1]["content"]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat up to where the completion begins. Thinking is off in every prompt of a run."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """What was written, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _place(is_parquet: bool) -> str:
    return "row" if is_parquet else "line"


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
