from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from retort.config import MethodConfig
from services.trainer.batch import StepBatch, assemble, join
from services.trainer.prompts import encode_prompt
from tests.training import a_batch, a_group, a_question, a_rollout

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "models" / "tiny")
SOLUTIONS = [
    TOKENIZER.encode(text, add_special_tokens=False) for text in ("one", "two", "three", "1 + 1</think>\n\ntwo")
]


def rows_of_lengths(*lengths: int) -> StepBatch:
    return a_batch([a_group(*(a_rollout([5] * length) for length in lengths))], [0.0] * len(lengths))


def assembled(*rewards: list[float], method: MethodConfig | None = None) -> StepBatch:
    """One group per list of rewards; completion j of each is SOLUTIONS[j]."""
    groups = [
        a_group(*(a_rollout(SOLUTIONS[j], reward=reward) for j, reward in enumerate(of_group)), prompt_ids=[index])
        for index, of_group in enumerate(rewards)
    ]
    questions = [a_question(index) for index in range(len(groups))]
    return assemble(3, groups, questions, TOKENIZER, method or MethodConfig())


def what_the_teacher_reads(question: int, solution: str) -> list[int]:
    turn = f"Question {question}?\nCorrect solution:\n\n{solution}\n\nCorrectly solve the original question."
    return encode_prompt(TOKENIZER, [{"role": "user", "content": turn}])


def test_advantages_are_within_the_group() -> None:
    assert assembled([1.0, 0.0, 0.5], [1.0, 1.0, 1.0]).advantages.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]


def test_every_row_stands_behind_its_groups_prompt() -> None:
    assert assembled([1.0, 0.0], [0.0, 0.0]).prompts == [[0], [0], [1], [1]]


def test_the_teacher_is_shown_the_first_right_sibling_and_never_the_row_itself() -> None:
    batch = assembled([0.0, 1.0, 1.0], [0.0, 1.0, 0.0])
    assert batch.demonstrations == [1, 2, 1, 1, None, 1]
    assert batch.teacher_prompts[0] == what_the_teacher_reads(0, "two")
    assert batch.teacher_prompts[1] == what_the_teacher_reads(0, "three")
    assert batch.teacher_prompts[3] == what_the_teacher_reads(1, "two")
    assert batch.teacher_prompts[4] is None
    assert batch.has_demonstration.tolist() == [True, True, True, True, False, True]


def test_the_thinking_before_a_solution_is_shown_or_left_out_as_the_method_says() -> None:
    rewards = [0.0, 0.0, 0.0, 1.0]
    assert assembled(rewards).teacher_prompts[0] == what_the_teacher_reads(0, "1 + 1</think>\n\ntwo")
    stripped = assembled(rewards, method=MethodConfig(strip_thinking=True))
    assert stripped.teacher_prompts[0] == what_the_teacher_reads(0, "two")


def test_plain_grpo_shows_nothing() -> None:
    batch = assembled([0.0, 1.0], method=MethodConfig(name="grpo"))
    assert (batch.teacher_prompts, batch.demonstrations) == ([None, None], [None, None])


def test_a_teacher_prompt_that_would_be_too_long_counts_as_none() -> None:
    longest = len(what_the_teacher_reads(0, "two"))
    assert assembled([0.0, 1.0], method=MethodConfig(max_teacher_prompt_tokens=longest)).teacher_prompts[0] is not None
    too_long = assembled([0.0, 1.0], method=MethodConfig(max_teacher_prompt_tokens=longest - 1))
    assert too_long.teacher_prompts == [None, None]
    assert not too_long.has_demonstration.any()


def test_only_rows_with_an_advantage_are_active_and_only_those_with_a_demonstration_taught() -> None:
    batch = assembled([0.0, 1.0], [1.0, 1.0], [0.0, 0.0])
    assert batch.active_rows == [0, 1]
    assert batch.taught_rows == [0]


def test_rows_without_an_advantage_are_scored_only_for_the_metrics() -> None:
    batch = assembled([0.0, 1.0], [1.0, 1.0])
    assert batch.scored_rows == batch.active_rows == [0, 1]
    batch.scores_idle_rows = True
    assert (batch.scored_rows, batch.active_rows, batch.taught_rows) == ([0, 1, 2, 3], [0, 1], [0])


def test_tokens_are_flat_row_after_row() -> None:
    batch = rows_of_lengths(2, 0, 3)
    assert batch.tokens_of([2, 0]).tolist() == [2, 3, 4, 0, 1]
    assert batch.tokens_of([1]).tolist() == batch.tokens_of([]).tolist() == []
    assert batch.row_of_tokens([2, 0, 1]).tolist() == [2, 2, 2, 0, 0]
    assert batch.split(torch.arange(5.0)) == [[0.0, 1.0], [], [2.0, 3.0, 4.0]]


def test_rollout_logprobs_are_flat_as_well() -> None:
    rollouts = [a_rollout([5, 6], logprobs=[-0.5, -0.25]), a_rollout([7], logprobs=[-2.0])]
    assert a_batch([a_group(*rollouts)], [0.0, 0.0]).rollout_logprobs.tolist() == [-0.5, -0.25, -2.0]


def test_in_a_length_sweep_updates_go_from_short_to_long_and_back() -> None:
    batch = rows_of_lengths(5, 1, 4, 2, 6, 3)
    # Sorted by length the rows are 1 3 5 2 0 4: every other one on the way up, the rest on the way down.
    assert batch.updates("length_sweep", 2, seed=0) == [[1, 5], [0, 4], [2, 3]]


def test_updates_by_group_keep_the_order_of_slots() -> None:
    assert rows_of_lengths(5, 1, 4, 2).updates("group", 2, seed=0) == [[0, 1], [2, 3]]


def test_a_shuffle_is_a_function_of_seed_and_step() -> None:
    batch = rows_of_lengths(*range(1, 33))
    assert batch.updates("shuffle", 8, seed=0) == batch.updates("shuffle", 8, seed=0)
    assert batch.updates("shuffle", 8, seed=0) != batch.updates("shuffle", 8, seed=1)


def test_the_updates_of_a_step_that_came_in_parts_are_counted_through() -> None:
    parts = [rows_of_lengths(5, 1, 4, 2), rows_of_lengths(1, 2)]
    for part in parts:
        part.old_logprobs = part.entropies = part.teacher_logprobs = part.rollout_logprobs
        part.updates("group", 2, seed=0)
    assert join(parts).update_of.tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("order", ["length_sweep", "shuffle", "group"])
def test_every_row_is_in_exactly_one_update(order: str) -> None:
    updates = rows_of_lengths(*[3, 1, 2, 2, 5, 1, 1, 9]).updates(order, 4, seed=3)
    assert [len(rows) for rows in updates] == [4, 4]
    assert sorted(row for rows in updates for row in rows) == list(range(8))
