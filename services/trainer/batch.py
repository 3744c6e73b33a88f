"""One training step's data: its groups, row by row, with everything the loss needs that takes no forward pass."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from retort.config import MethodConfig
from retort.questions import Question
from retort.rollouts import Rollout, RolloutGroup
from services.trainer.advantage import demonstration_choice, overlong_penalty
from services.trainer.methods import method_of
from services.trainer.prompts import decode, encode_prompt
from services.trainer.teacher_prompt import strip_thinking, teacher_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class StepBatch:
    """The R completions of a step, or of a part of it, group after group.

    N counts their tokens; per-token tensors are flat [N].
    """

    step: int
    groups: list[RolloutGroup]
    rollouts: list[Rollout]
    """[R]"""
    prompts: list[list[int]]
    """[R]"""
    teacher_prompts: list[list[int] | None]
    """[R] prompt that shows a sibling's solution; None where there is none to show, or it would be too long."""
    demonstrations: list[int | None]
    """[R] index, within the group, of the sibling shown."""
    advantages: Tensor
    """[R]"""
    rollout_logprobs: Tensor
    """[N]"""
    teaches_without_advantage: bool = False
    """Whether rows with advantage 0 have a gradient too, because their teacher has a say."""
    scores_idle_rows: bool = False
    """Whether rows without a gradient get old logprobs too, for the metrics."""
    teacher_logprobs: Tensor = field(init=False)
    """[N] filled in by the training step, as are the old logprobs; meaningless in rows that were not scored."""
    old_logprobs: Tensor = field(init=False)
    entropies: Tensor = field(init=False)
    token_weights: Tensor = field(init=False)
    """[N] factor on the advantage; filled by the updates, on the rank that computed the token, 0 elsewhere."""
    update_of: Tensor = field(init=False)
    """[R] number, from 1, of the update that a row counts in; 0 until `updates` has dealt it."""

    def __post_init__(self) -> None:
        lengths = [len(rollout.completion_ids) for rollout in self.rollouts]
        self.lengths = torch.tensor(lengths)
        self._starts = [0, *accumulate(lengths)]
        self.has_demonstration = torch.tensor([prompt is not None for prompt in self.teacher_prompts])
        self.token_weights = torch.zeros(sum(lengths))
        self.update_of = torch.zeros(len(lengths), dtype=torch.long)

    @property
    def completions(self) -> list[list[int]]:
        return [rollout.completion_ids for rollout in self.rollouts]

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts]

    @property
    def active_rows(self) -> list[int]:
        """Rows with a gradient; that of the others is exactly 0, and they count in denominators only."""
        return [
            row
            for row, advantage in enumerate(self.advantages.tolist())
            if advantage or (self.teaches_without_advantage and self.teacher_prompts[row] is not None)
        ]

    @property
    def scored_rows(self) -> list[int]:
        """Rows that get old logprobs: what the engine is compared on."""
        return list(range(len(self.rollouts))) if self.scores_idle_rows else self.active_rows

    @property
    def taught_rows(self) -> list[int]:
        """Active rows whose teacher has something to say."""
        return [row for row in self.active_rows if self.teacher_prompts[row] is not None]

    def tokens_of(self, rows: Sequence[int]) -> Tensor:
        """Indices into the per-token tensors of all tokens of the given rows, in their order."""
        spans = [torch.arange(self._starts[row], self._starts[row + 1]) for row in rows]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    def row_of_tokens(self, rows: Sequence[int]) -> Tensor:
        """The row of each of those tokens."""
        indices = torch.tensor(rows, dtype=torch.long)
        return indices.repeat_interleave(self.lengths[indices])

    def split(self, per_token: Tensor) -> list[list[float]]:
        """Per-token values [N] as one list per row."""
        return [part.tolist() for part in torch.split(per_token, self.lengths.tolist())]

    def updates(
        self, order: Literal["arrival", "length_sweep", "shuffle", "group"], size: int, seed: int
    ) -> list[list[int]]:
        """Deal the rows to updates of `size` rows, and note it; as they stand, unless the order is another.

        `length_sweep` is the reference run's order: rows alike in length, short to long and back to short. There it
        comes about by 8 GPUs sorting their shares up and down in turn; here by taking every other row of the sorted
        list on the way up and the rest on the way down, on any number of ranks.
        """
        rows = list(range(len(self.rollouts)))
        if order == "shuffle":
            random.Random(f"{seed}/{self.step}").shuffle(rows)
        elif order == "length_sweep":
            rows.sort(key=lambda row: int(self.lengths[row]))
            rows = rows[0::2] + rows[1::2][::-1]
        dealt = [rows[start : start + size] for start in range(0, len(rows), size)]
        for number, members in enumerate(dealt, start=1):
            self.update_of[members] = number
        return dealt


def join(parts: Sequence[StepBatch]) -> StepBatch:
    """The parts of a step as one batch, with everything that was computed for them."""

    def listed(name: str) -> list[Any]:
        return [one for part in parts for one in getattr(part, name)]

    def concatenated(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    whole = replace(
        parts[0],
        groups=listed("groups"),
        rollouts=listed("rollouts"),
        prompts=listed("prompts"),
        teacher_prompts=listed("teacher_prompts"),
        demonstrations=listed("demonstrations"),
        advantages=concatenated("advantages"),
        rollout_logprobs=concatenated("rollout_logprobs"),
    )
    for name in ("teacher_logprobs", "old_logprobs", "entropies", "token_weights"):
        setattr(whole, name, concatenated(name))
    made = accumulate((int(part.update_of.max()) for part in parts[:-1]), initial=0)
    whole.update_of = torch.cat([part.update_of + before for part, before in zip(parts, made, strict=True)])
    return whole


def assemble(
    step: int,
    groups: Sequence[RolloutGroup],
    questions: Sequence[Question],
    tokenizer: "PreTrainedTokenizerBase",
    config: MethodConfig,
    *,
    scores_idle_rows: bool = False,
) -> StepBatch:
    """Advantages within each group, and for each row the solution that its teacher is shown.

    `questions[i]` is what group i was asked.
    """
    method = method_of(config)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    members = [index for index, group in enumerate(groups) for _ in group.rollouts]
    shaped = [
        rollout.reward
        + overlong_penalty(len(rollout.completion_ids), max_length=config.horizon, buffer=config.overlong_buffer)
        for rollout in rollouts
    ]
    shown = _shown_rows(method.parts.context, rollouts, members, config.success_threshold)
    encode = _teacher_prompts(rollouts, questions, tokenizer, config)
    return StepBatch(
        step=step,
        groups=list(groups),
        rollouts=rollouts,
        prompts=[group.prompt_ids for group in groups for _ in group.rollouts],
        teacher_prompts=[
            None if row is None else encode(row, member) for row, member in zip(shown, members, strict=True)
        ],
        demonstrations=[
            row - members.index(member) if row is not None and members[row] == member else None
            for row, member in zip(shown, members, strict=True)
        ],
        advantages=torch.tensor(method.advantages(shaped, members), dtype=torch.float64),
        rollout_logprobs=torch.tensor([lp for rollout in rollouts for lp in rollout.rollout_logprobs]),
        teaches_without_advantage=method.teaches_without_advantage,
        scores_idle_rows=scores_idle_rows,
    )


def _shown_rows(
    context: str, rollouts: Sequence[Rollout], members: Sequence[int], threshold: float
) -> list[int | None]:
    """For each row, the row whose completion its teacher is shown."""
    if context == "none":
        return [None] * len(rollouts)
    rewards = [rollout.reward for rollout in rollouts]
    if context == "sibling":
        return demonstration_choice(rewards, members, threshold=threshold)
    # The control: the first success of the next group that has one, so a solution that says nothing of this question.
    right = [row for row, reward in enumerate(rewards) if reward >= threshold]
    after = [[row for row in right if members[row] > member] for member in members]
    before = [[row for row in right if members[row] < member] for member in members]
    return [next(iter(later + earlier), None) for later, earlier in zip(after, before, strict=True)]


def _teacher_prompts(
    rollouts: Sequence[Rollout],
    questions: Sequence[Question],
    tokenizer: "PreTrainedTokenizerBase",
    config: MethodConfig,
) -> Callable[[int, int], list[int] | None]:
    """From the row that is shown and the group that is asked to the teacher's prompt; None where it is too long."""

    @cache
    def encode(row: int, member: int) -> list[int] | None:
        completion = decode(tokenizer, rollouts[row].completion_ids)
        solution = strip_thinking(completion) if config.strip_thinking else completion
        prompt = encode_prompt(tokenizer, teacher_messages(questions[member].messages, solution))
        return prompt if len(prompt) <= config.max_teacher_prompt_tokens else None

    return encode
