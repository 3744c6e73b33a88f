"""An update of TRL's GRPOTrainer on given completions, for `benchmarks.trainer` and in its environment."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from services.trainer.batch import StepBatch
from services.trainer.parts import freeze_heap

# In place of its defaults for a CPU too: bfloat16 autocast and activation checkpointing.
LIKE_RETORT = {"bf16": False, "gradient_checkpointing": False}


class GivenCompletions(GRPOTrainer):
    """Generation and scoring replaced; what is left is the loss, its gradient and the optimizer."""

    given: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, _inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.given


class Timed(TrainerCallback):
    """The first update is for its gradient, before the optimizer takes it; the others wait for their turn."""

    def __init__(self, turns: Any) -> None:
        self._turns = turns

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step:
            self._turns.begin()

    def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, model: Any, **_: Any) -> None:
        if not state.global_step:
            self._turns.keep({name: p.grad.clone() for name, p in model.named_parameters()})

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step > 1:
            self._turns.end()
        else:
            freeze_heap()  # as Retort's trainer does


def as_generated(batch: StepBatch) -> dict[str, torch.Tensor]:
    """What the replaced method returns: every row as long as the longest of the step, as TRL pads them."""
    completions = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in batch.completions], batch_first=True)
    prompts = torch.tensor(batch.prompts)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": (torch.arange(completions.shape[1]) < batch.lengths[:, None]).long(),
        "advantages": batch.advantages.float(),
        "num_items_in_batch": batch.lengths.sum(),
    }


def no_rewards(**_: Any) -> list[float]:
    """TRL wants a function even where nothing is scored."""
    return []


def train(model: Any, batch: StepBatch, turns: Any, *, args: Any, folder: Path) -> None:
    """One update for the gradient and `args.repeats` that are timed, each on the whole step."""
    rows = len(batch.rollouts)
    config = GRPOConfig(
        str(folder),
        max_steps=args.repeats + 1,
        per_device_train_batch_size=args.rows,
        gradient_accumulation_steps=rows // args.rows,
        max_completion_length=args.longest,
        max_grad_norm=1e9,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **(LIKE_RETORT if args.contender == "trl_float32" else {}),
    )
    trainer = GivenCompletions(
        model,
        reward_funcs=no_rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "none"}] * rows),
        processing_class=AutoTokenizer.from_pretrained("models/tiny"),
        callbacks=[Timed(turns)],
    )
    trainer.given = as_generated(batch)
    trainer.train()
