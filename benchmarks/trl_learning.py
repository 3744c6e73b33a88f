"""The demo's task trained by TRL's GRPOTrainer, generation and all, for `benchmarks.end_to_end` and in its environment.

Model, questions, checker, batches and the settings of the optimizer are those of the run file. Prints one JSON object:
seconds of training, without validation, and avg@16, by step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.trl_step import LIKE_RETORT
from retort.config import RunConfig, load_config
from retort.questions import Question, load_questions
from services.reward.checkers import Reward
from services.reward.checkers.mcq import MultipleChoice
from services.trainer.prompts import decode, encode_prompt

ROWS_AT_ONCE = 128
"""Of a batch that is generated for validation."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--goal", type=float, required=True, help="ends at it")
    parser.add_argument("--steps", type=int, required=True, help="at most")
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--like-retort", action="store_true", help="in float32, without activation checkpointing")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(json.dumps(learn(load_config(args.config), args)))


def learn(run: RunConfig, args: argparse.Namespace) -> list[dict[str, float]]:
    tokenizer = AutoTokenizer.from_pretrained(run.model.path)
    questions = load_questions(run.data.train)
    rows, updates = run.trainer.groups_per_step * run.trainer.group_size, updates_per_step(run)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            seed=args.seed,
            max_steps=args.steps * updates,
            per_device_train_batch_size=rows // updates,
            steps_per_generation=updates,
            num_generations=run.trainer.group_size,
            max_completion_length=run.sampling.max_completion_tokens,
            temperature=run.sampling.temperature,
            top_p=run.sampling.top_p,
            learning_rate=run.trainer.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=run.trainer.weight_decay,
            max_grad_norm=run.trainer.max_grad_norm,
            epsilon=run.method.clip_low,
            epsilon_high=run.method.clip_high,
            loss_type="grpo",
            beta=0.0,
            chat_template_kwargs={"enable_thinking": False},
            **(LIKE_RETORT if args.like_retort else {}),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        curve = Curve(run, tokenizer, load_questions(run.data.validation), goal=args.goal, every=args.every * updates)
        GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32),
            reward_funcs=graded,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": one.messages, "answer": one.answer} for one in questions]),
            processing_class=tokenizer,
            callbacks=[curve],
        ).train()
    return curve.points


def updates_per_step(run: RunConfig) -> int:
    return run.trainer.groups_per_step // run.trainer.groups_per_update


def graded(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    return [reward(turns[0]["content"], right) for turns, right in zip(completions, answer, strict=True)]


def reward(completion: str, answer: str) -> float:
    verdict = MultipleChoice().check(completion, answer, {})
    assert isinstance(verdict, Reward)
    return verdict.value


class Curve(TrainerCallback):
    """Validates before the first and after every so many updates, with the clock stopped, and ends at the goal."""

    def __init__(self, run: RunConfig, tokenizer: Any, questions: list[Question], *, goal: float, every: int) -> None:
        self.points: list[dict[str, float]] = []
        self._run, self._tokenizer, self._questions = run, tokenizer, questions[: run.validation.max_questions or None]
        self._goal, self._every = goal, every
        self._seconds, self._resumed = 0.0, 0.0

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, model: Any, **_: Any) -> None:
        self._validate(model)
        self._resumed = time.perf_counter()

    def on_step_end(self, _args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step % self._every:
            return
        self._seconds += time.perf_counter() - self._resumed
        step = state.global_step // updates_per_step(self._run)
        average = self._validate(model)
        self.points.append({"step": step, "seconds": self._seconds, "avg@16": average})
        control.should_training_stop = average >= self._goal
        self._resumed = time.perf_counter()

    def _validate(self, model: Any) -> float:
        settings = self._run.validation
        asked = [one for one in self._questions for _ in range(settings.samples)]
        rewards: list[float] = []
        model.eval()
        for start in range(0, len(asked), ROWS_AT_ONCE):
            batch = asked[start : start + ROWS_AT_ONCE]
            prompts = [encode_prompt(self._tokenizer, one.messages) for one in batch]
            padded = self._tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
            sampled = model.generate(
                **padded,
                do_sample=True,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=0,
                max_new_tokens=self._run.sampling.max_completion_tokens,
            )
            completions = sampled[:, padded["input_ids"].shape[1] :].tolist()
            texts = [decode(self._tokenizer, completion) for completion in completions]
            rewards += [reward(text, one.answer) for text, one in zip(texts, batch, strict=True)]
        model.train()
        return sum(rewards) / len(rewards)


if __name__ == "__main__":
    main()
