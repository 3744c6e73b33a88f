"""However rows are packed and dealt to ranks, a step is the plain formulas applied to one sequence at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from services.trainer.batch import StepBatch
from tests.integration.rank_programs import (
    TINY,
    Shape,
    a_random_step,
    a_recorded_step,
    a_run,
    one_update,
    scored_beside_first_pass,
    updates_with_a_nan,
)
from tests.integration.reference_trainer import ReferenceTrainer, Row, gradients_of
from tests.integration.trainer_ranks import Ranks
from tests.training import a_config, a_language_model

RanksOf = Callable[[int], Ranks]
SHAPES = st.builds(
    Shape,
    prompt=st.integers(1, 8),
    completion=st.integers(0, 12),
    advantage=st.sampled_from([-0.875, -0.25, 0.0, 0.125, 0.75]),
    is_taught=st.booleans(),
)
ONE_VERY_LONG = [Shape(4, 600, 0.5, True), Shape(3, 2, -0.5, False), Shape(1, 1, -0.25, True), Shape(1, 1, 0.5, False)]


def rows_of(batch: StepBatch) -> list[Row]:
    rows = []
    for index, rollout in enumerate(batch.rollouts):
        tokens = batch.tokens_of([index])
        rows.append(
            Row(
                prompt=batch.prompts[index],
                completion=rollout.completion_ids,
                rollout_logprobs=batch.rollout_logprobs[tokens].double(),
                advantage=float(batch.advantages[index]),
                teacher_prompt=batch.teacher_prompts[index],
                old_logprobs=batch.old_logprobs[tokens],
                teacher_logprobs=batch.teacher_logprobs[tokens],
            )
        )
    return rows


def check_one_update(
    ranks: Ranks,
    shapes: Sequence[Shape],
    seed: int,
    token_budget: int,
    *,
    tied: bool = True,
    checkpointing: bool = False,
) -> None:
    model = a_language_model(attention="sdpa", tied=tied)
    loss, gradients = gradients_of(model, rows_of(a_random_step(shapes, seed))[:-1])
    for on_rank in ranks.run(one_update, shapes, seed, token_budget, tied, checkpointing):
        assert on_rank[0] == pytest.approx(loss, abs=1e-10)
        assert on_rank[1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(on_rank[1][name], gradient.numpy(), rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@settings(max_examples=15, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=2, max_size=8), seed=st.integers(0, 99), token_budget=st.integers(1, 60))
def test_packing_changes_neither_loss_nor_gradients(
    ranks: RanksOf, size: int, shapes: list[Shape], seed: int, token_budget: int
) -> None:
    check_one_update(ranks(size), shapes, seed, token_budget)


@pytest.mark.parametrize("size", [1, 2, 3])
@settings(max_examples=10, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=8), seed=st.integers(0, 99), token_budget=st.integers(1, 60))
def test_old_logprobs_from_the_first_updates_pass_are_those_of_a_pass_of_their_own(
    ranks: RanksOf, size: int, shapes: list[Shape], seed: int, token_budget: int
) -> None:
    for apart, at_once in ranks(size).run(scored_beside_first_pass, shapes, seed, token_budget):
        for ours, theirs in zip(at_once, apart, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_very_long_row_and_ranks_without_rows_change_nothing(
    ranks: RanksOf, size: int, tied: bool, checkpointing: bool
) -> None:
    check_one_update(ranks(size), ONE_VERY_LONG, 0, 32, tied=tied, checkpointing=checkpointing)
    check_one_update(ranks(size), ONE_VERY_LONG[-2:], 0, 32, tied=tied, checkpointing=checkpointing)


@pytest.mark.parametrize("update_order", ["group", "arrival"])
def test_the_whole_step_equals_the_plain_formulas_for_three_steps(
    ranks: RanksOf, tmp_path: Path, update_order: str
) -> None:
    """Six updates. The first step of the warm-up has rate 0; the second update of step 2 has no advantage at all."""
    mixed, right, wrong = [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    rewards = {
        1: [mixed, right, wrong, [1.0, 1.0, 0.0]],
        2: [mixed, mixed, right, wrong],
        3: [wrong, [0.0, 1.0, 1.0], mixed, right],
    }
    config = a_config(
        tmp_path,
        trainer={
            "steps": 3,
            "update_order": update_order,
            "group_size": 3,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "micro_batch_tokens": 40,
            "max_logprob_gap": 100.0,
        },
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    reference = ReferenceTrainer(
        a_language_model(attention="sdpa", vocabulary=len(tokenizer)),
        a_language_model(attention="sdpa", vocabulary=len(tokenizer)),
        max_grad_norm=0.05,
        weight_decay=0.1,
    )
    for step, of_groups in rewards.items():
        rows = plain_rows(step, of_groups, tokenizer)
        reference.step([rows[:6], rows[6:]], learning_rate=0.0 if step == 1 else 1e-2)

    expected = {
        "policy": {name: p.detach().numpy() for name, p in reference.policy.named_parameters()},
        "teacher": {name: p.detach().numpy() for name, p in reference.teacher.named_parameters()},
        "exp_avg": {name: moment.numpy() for name, moment in reference.first.items()},
        "exp_avg_sq": {name: moment.numpy() for name, moment in reference.second.items()},
        "step": {name: np.array(6.0) for name in reference.first},
    }
    untrained = {name: p.detach().numpy() for name, p in a_language_model(vocabulary=len(tokenizer)).named_parameters()}
    for state in ranks(2).run(a_run, config, rewards, len(tokenizer)):
        check_state(state, expected)
        assert all(np.abs(state["policy"][name] - before).max() > 1e-3 for name, before in untrained.items())


def plain_rows(step: int, rewards: Sequence[Sequence[float]], tokenizer: object) -> list[Row]:
    """Advantage: reward minus the group's mean. Demonstration: the first other row of the group that is right."""
    rows = []
    for index, group in enumerate(a_recorded_step(step, rewards)):
        mean = sum(rewards[index]) / len(rewards[index])
        for number, rollout in enumerate(group.rollouts):
            shown = next((i for i, r in enumerate(rewards[index]) if r == 1.0 and i != number), None)
            prompt = None if shown is None else teacher_prompt(tokenizer, index, group.rollouts[shown].completion_ids)
            rows.append(
                Row(
                    prompt=group.prompt_ids,
                    completion=rollout.completion_ids,
                    rollout_logprobs=torch.tensor(rollout.rollout_logprobs, dtype=torch.float64),
                    advantage=rollout.reward - mean,
                    teacher_prompt=prompt,
                )
            )
    return rows


def teacher_prompt(tokenizer: object, question: int, demonstration: Sequence[int]) -> list[int]:
    text = tokenizer.decode(demonstration, skip_special_tokens=True)
    turn = f"Question {question}?\nCorrect solution:\n\n{text}\n\nCorrectly solve the original question."
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return tokenizer.encode(chat, add_special_tokens=False)


def check_state(
    state: Mapping[str, Mapping[str, np.ndarray]], expected: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    assert state.keys() == expected.keys()
    for part, tensors in expected.items():
        assert state[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(state[part][name], tensor, rtol=0, atol=1e-10, err_msg=f"{part}.{name}")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_nan_on_one_rank_changes_nothing_on_any(ranks: RanksOf, rows: int) -> None:
    for (good, before), (bad, skipped), (good_again, after) in ranks(2).run(updates_with_a_nan, rows):
        assert (good, bad, good_again) == (True, False, True)
        for part, tensors in before.items():
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(skipped[part][name], tensor, err_msg=f"{part}.{name}")
        assert all(np.isfinite(tensor).all() for tensors in after.values() for tensor in tensors.values())
        assert {float(step) for step in after["step"].values()} == {2.0}
