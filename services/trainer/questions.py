"""The questions of a data file, and the prompts that they make."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from retort.config import ConfigError

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
    """A line as it stands in the file. Other keys are allowed and mean nothing here."""

    answer: str
    messages: list[dict[str, str]] = []
    prompt: str = ""
    system: str = ""
    data_source: str = ""
    dataset: str = ""


def load_questions(path: Path | str) -> list[Question]:
    """Read a JSON Lines file of questions.

    A line holds `answer` and either `messages`, or `prompt` with an optional `system`. The data source is
    `data_source`, else `dataset`, else the file's name without its ending.
    Raises ConfigError, naming file, line and what is wrong.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the data file: {error.strerror}.") from None
    if not lines:
        raise ConfigError(f"{path}: the data file is empty; expected a JSON object with a question on each line.")
    questions = []
    for index, line in enumerate(lines):
        try:
            questions.append(_question(line, index, default_source=path.stem))
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"{path}, line {index + 1}: {error}") from None
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


def _question(line: bytes, index: int, *, default_source: str) -> Question:
    row = msgspec.json.decode(line, type=_Row)
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
