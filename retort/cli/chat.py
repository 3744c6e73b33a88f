"""`retort chat RUN_DIR`: talk to the model that a run made, on the CPU.

Every question stands alone, with the system prompt and in the form of the run's own questions, because that is what the
model learned. What is said about this goes to stderr, so that stdout holds the answers.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.cli.invocation import command
from retort.config import ConfigError, RunConfig, SamplingConfig, ValidationConfig, load_config

END = "."
"""A line of this alone ends a question that may have several lines."""


@dataclass(frozen=True)
class Example:
    """One row of the run's validation file."""

    system: str
    question: str
    answer: str


@dataclass(frozen=True)
class Form:
    """What the questions of a run have in common; without any, nothing."""

    examples: Sequence[Example] = ()

    @property
    def system(self) -> str:
        return self.examples[0].system if self.examples else ""

    @property
    def last_line(self) -> str:
        """The line with which every question ends; empty if they differ, or are too few to tell."""
        last = {_last_line(example.question) for example in self.examples}
        return last.pop() if len(last) == 1 and len(self.examples) > 1 else ""

    @property
    def line_counts(self) -> set[int]:
        return {_line_count(example.question) for example in self.examples}

    def describe(self) -> str:
        """What a question has to look like, and one that does."""
        counts = sorted(self.line_counts)
        lines = f"{counts[0]} to {counts[-1]} lines" if len(counts) > 1 else "1 line"
        if len(counts) == 1 and counts[0] > 1:
            lines = f"{counts[0]} lines"
        ending = f' and end with "{self.last_line}"' if self.last_line else ""
        example = self.examples[0]
        return (
            f"The model learned to answer questions like this one; they have {lines}{ending}:\n\n"
            f"{example.question}\n\n(right answer: {example.answer})"
        )

    def completed(self, question: str) -> str:
        """The question with the last line that the run's questions have; says on stderr what it added or misses."""
        if self.last_line and _last_line(question) != self.last_line:
            print(f'(added the last line of this run\'s questions: "{self.last_line}")', file=sys.stderr)
            question = f"{question}\n{self.last_line}"
        if self.examples and _line_count(question) not in self.line_counts:
            print(f"(this question has another form than the run's. {self.describe()})", file=sys.stderr)
        return question


@dataclass(frozen=True)
class ChatModel:
    """A model with its tokenizer, and how it samples."""

    model: Any
    tokenizer: Any
    temperature: float
    top_p: float
    max_completion_tokens: int

    def reply(self, system: str, question: str) -> None:
        """Print the completion while it is being sampled."""
        import torch
        from transformers import TextStreamer

        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            self.model.generate(
                **prompt,
                do_sample=True,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0,
                max_new_tokens=self.max_completion_tokens,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Standard input that is no terminal holds one question, or several with a line {END!r} after each."
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run, for example runs/tiny-cpu")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this question and leave")
    parser.add_argument("--hf-dir", type=Path, metavar="DIR", help="model in Hugging Face format (default: RUN_DIR/hf)")


def main(args: argparse.Namespace) -> int:
    """Answer the questions given, or those of a user until he leaves. Raises ConfigError when there is no model."""
    directory = args.hf_dir or args.run_dir / "hf"
    _check_model(directory)
    config = _config(args.run_dir)
    form = Form(_examples(args.run_dir, config) if config else [])
    if args.prompt is None and sys.stdin.isatty():
        _converse(load(directory, config), form)
        return 0
    questions = [args.prompt] if args.prompt is not None else split_questions(sys.stdin.read())
    if not questions:
        raise ConfigError("standard input holds no question. Write one there, or name it with --prompt.")
    chat_model = load(directory, config)
    for number, question in enumerate(questions):
        if number:
            print()
        chat_model.reply(form.system, form.completed(question))
    return 0


def split_questions(text: str) -> list[str]:
    """One question, or several with a line END after each."""
    questions: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == END:
            questions.append([])
        else:
            questions[-1].append(line)
    return [question for lines in questions if (question := "\n".join(lines).strip())]


def load(directory: Path, config: RunConfig | None) -> ChatModel:
    """The model in `directory`, sampling as the run's validation does. Raises ConfigError when it is not one."""
    print(f"loading the model in {directory}, which takes some seconds ...", file=sys.stderr, flush=True)
    # Read when transformers is first imported; warnings and bars would stand between the user and the answer.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype="float32")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: the model does not load: {error}") from None
    sampling = config.sampling if config else SamplingConfig()
    validation = config.validation if config else ValidationConfig()
    return ChatModel(model.eval(), tokenizer, validation.temperature, validation.top_p, sampling.max_completion_tokens)


def _check_model(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory}: no model here. A run writes hf/ with its checkpoints: wait for the first, "
            f"continue the run with `{command('run', 'CONFIG', '--resume')}`, or name another model with --hf-dir."
        )


def _converse(chat_model: ChatModel, form: Form) -> None:
    with contextlib.suppress(ImportError):
        # Python switches off what lets a pasted question with several lines arrive as one.
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
    if form.examples:
        print(f"\n{form.describe()}\n\nEnter alone asks this one.", end=" ")
    ends = f"A question ends with a line {END!r}" if form.line_counts - {1} else "Enter asks a question"
    ends += ", or with its last line as above" if form.last_line else ""
    print(f"{ends}; Ctrl-C stops an answer; Ctrl-D leaves.\n")
    while (question := _read_question(form)) is not None:
        if question:
            _answer(chat_model, form.system, form.completed(question))
        elif form.examples:
            _answer(chat_model, form.system, form.examples[0].question)
            print(f"(right answer: {form.examples[0].answer})")


def _read_question(form: Form) -> str | None:
    """What the user types until his question ends; empty if he only pressed Enter; None when he leaves."""
    lines: list[str] = []
    try:
        while True:
            lines += input("... " if lines else "> ").splitlines() or [""]
            is_over = lines[-1].strip() in {END, form.last_line} - {""}
            if is_over or lines == [""] or not form.line_counts - {1}:
                break
    except (EOFError, KeyboardInterrupt) as left:
        print()
        if isinstance(left, KeyboardInterrupt) or not lines:
            return None
    if lines[-1].strip() == END:
        lines.pop()
    return "\n".join(lines).strip()


def _answer(chat_model: ChatModel, system: str, question: str) -> None:
    try:
        chat_model.reply(system, question)
    except KeyboardInterrupt:
        print("\n(stopped)")


def _config(run_dir: Path) -> RunConfig | None:
    """None where there is no run but only a model, which is enough to chat."""
    file = run_dir / "config.toml"
    return load_config(file, env={}) if file.is_file() else None


def _examples(run_dir: Path, config: RunConfig) -> list[Example]:
    """The questions that the run was validated on, or else those of its validation file."""
    file = Path(config.data.validation)
    try:
        rows = [_example(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        print(f"{file}: {error}: asking without the run's system prompt", file=sys.stderr)
        rows = []
    return _validated(run_dir, rows[0].system if rows else "") or rows


def _example(row: dict[str, Any]) -> Example:
    messages = row.get("messages") or [
        {"role": "system", "content": row.get("system", "")},
        {"role": "user", "content": row["prompt"]},
    ]
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    return Example(system=system, question=messages[-1]["content"], answer=row["answer"])


def _validated(run_dir: Path, system: str) -> list[Example]:
    """Of the run's first validation, which is written whole or not at all."""
    files = sorted((run_dir / "validation").glob("step-*.jsonl"))[:1]
    groups = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Example(system, group["question"], group["answer"]) for group in groups]


def _last_line(question: str) -> str:
    return question.strip().rpartition("\n")[2].strip()


def _line_count(question: str) -> int:
    return len(question.strip().splitlines())
