"""`retort chat RUN_DIR`: talk to the model that a run made, on the CPU.

Every question stands alone, with the system prompt that the run trained with, because that is what the model learned.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from retort.config import ConfigError, RunConfig, SamplingConfig, ValidationConfig, load_config

HELP = "A question and Enter asks it; Enter alone asks the example; Ctrl-C stops an answer; Ctrl-D leaves."


@dataclass(frozen=True)
class Example:
    """One row of the run's validation file."""

    system: str
    question: str
    answer: str


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
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run, for example runs/tiny-cpu")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and leave")
    parser.add_argument("--hf-dir", type=Path, metavar="DIR", help="model in Hugging Face format (default: RUN_DIR/hf)")


def main(args: argparse.Namespace) -> int:
    """Answer one prompt, or questions until the user leaves. Raises ConfigError when there is no model."""
    config = _config(args.run_dir)
    examples = list(_examples(config)) if config else []
    chat_model = load(args.hf_dir or args.run_dir / "hf", config)
    system = examples[0].system if examples else ""
    if args.prompt is not None:
        chat_model.reply(system, args.prompt)
        return 0
    _converse(chat_model, system, examples)
    return 0


def load(directory: Path, config: RunConfig | None) -> ChatModel:
    """The model in `directory`, sampling as the run's validation does. Raises ConfigError when it is not one."""
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory}: no model here. A run writes hf/ with its checkpoints: wait for the first, "
            "continue the run with `retort run CONFIG --resume`, or name another model with --hf-dir."
        )
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


def _converse(chat_model: ChatModel, system: str, examples: list[Example]) -> None:
    with contextlib.suppress(ImportError):
        # Python switches off what lets a pasted question with several lines arrive as one.
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
    print(HELP)
    offered = cycle(examples) if examples else None
    example = next(offered) if offered else None
    while True:
        if example:
            print(f"\nExample:\n{example.question}\n")
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question:
            _answer(chat_model, system, question)
        elif example and offered:
            _answer(chat_model, example.system, example.question)
            print(f"(right answer: {example.answer})")
            example = next(offered)


def _answer(chat_model: ChatModel, system: str, question: str) -> None:
    try:
        chat_model.reply(system, question)
    except KeyboardInterrupt:
        print("\n(stopped)")


def _config(run_dir: Path) -> RunConfig | None:
    """None where there is no run but only a model, which is enough to chat."""
    file = run_dir / "config.toml"
    return load_config(file, env={}) if file.is_file() else None


def _examples(config: RunConfig) -> Iterator[Example]:
    """The validation questions; none when the file has moved since."""
    file = Path(config.data.validation)
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            messages = row.get("messages") or [
                {"role": "system", "content": row.get("system", "")},
                {"role": "user", "content": row["prompt"]},
            ]
            system = next((m["content"] for m in messages if m["role"] == "system"), "")
            yield Example(system=system, question=messages[-1]["content"], answer=row["answer"])
