from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.admission import WorkList, data_indices
from tests.training import a_config, a_group, a_question

QUESTIONS = [a_question(index, answer="ABCD"[index % 4]) for index in range(10)]


def a_work_list(**sections: Any) -> WorkList:
    """Ten questions in steps of four: two steps an epoch."""
    return WorkList(a_config(**sections), QUESTIONS, QUESTIONS[:3], encode=lambda question: [100 + question.index])


@given(num_questions=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
def test_an_epoch_asks_each_question_at_most_once_and_drops_the_last_partial_batch(
    num_questions: int, data: st.DataObject, seed: int
) -> None:
    size = data.draw(st.integers(1, num_questions))
    steps_per_epoch = num_questions // size
    for epoch in (0, 1):
        of_steps = [
            data_indices(
                epoch * steps_per_epoch + position + 1, num_questions=num_questions, groups_per_step=size, seed=seed
            )
            for position in range(steps_per_epoch)
        ]
        assert {found for found, _ in of_steps} == {epoch}
        assert all(len(indices) == size for _, indices in of_steps)
        asked = [index for _, indices in of_steps for index in indices]
        assert len(asked) == len(set(asked)) == steps_per_epoch * size
        assert set(asked) <= set(range(num_questions))


def test_a_step_without_rest_covers_all_questions_and_every_epoch_has_its_own_order() -> None:
    orders = [data_indices(step, num_questions=20, groups_per_step=20, seed=0)[1] for step in (1, 2)]
    assert [sorted(order) for order in orders] == [list(range(20))] * 2
    assert orders[0] != orders[1]


def test_the_order_is_a_function_of_seed_and_step() -> None:
    def order(seed: int) -> list[int]:
        return data_indices(3, num_questions=100, groups_per_step=10, seed=seed)[1]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_a_group_is_named_after_epoch_and_question_so_ids_are_unique_in_a_run() -> None:
    items = [item for step in range(1, 9) for item in a_work_list().of_step(step)]
    assert len({item.group_id for item in items}) == len(items) == 32
    assert {item.group_id.split("-")[0] for item in items[:8]} == {"0"}
    assert {item.group_id.split("-")[0] for item in items[8:16]} == {"1"}


def test_asked_again_a_step_is_the_same_work() -> None:
    assert a_work_list().of_step(3) == a_work_list().of_step(3)


def test_every_sample_of_a_run_has_a_seed_of_its_own() -> None:
    seeds = [seed for step in range(1, 5) for item in a_work_list().of_step(step) for seed in item.seeds]
    assert len(set(seeds)) == len(seeds) == 4 * 4 * 2


def test_a_work_item_says_how_to_sample_and_grade() -> None:
    item = a_work_list(sampling={"temperature": 0.5, "top_p": 0.75, "max_completion_tokens": 6}).of_step(1)[0]
    index = int(item.group_id.split("-")[1])
    assert (item.kind, item.step, item.group_size) == ("train", 1, 2)
    assert (item.prompt_ids, item.answer, item.checker) == ([100 + index], "ABCD"[index % 4], "mcq")
    sampling = item.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_completion_tokens) == (0.5, 0.75, 6)


@pytest.mark.parametrize(("max_staleness", "oldest"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2]), (9, [0, 0, 0, 0])])
def test_staleness_bounds_the_policy_that_may_sample(max_staleness: int, oldest: list[int]) -> None:
    work = a_work_list(trainer={"max_staleness": max_staleness})
    assert [work.of_step(step)[0].min_policy_version for step in (1, 2, 3, 4)] == oldest


def test_validation_asks_all_questions_of_one_version() -> None:
    items = a_work_list(validation={"samples": 3, "temperature": 0.25, "top_p": 0.5}).of_validation(7)
    assert [item.group_id for item in items] == ["v7-000000", "v7-000001", "v7-000002"]
    for item in items:
        assert (item.kind, item.step, item.min_policy_version, item.group_size) == ("validation", 7, 7, 3)
        assert (item.sampling.temperature, item.sampling.top_p) == (0.25, 0.5)


def test_every_validation_draws_with_the_same_seeds() -> None:
    before, after = a_work_list().of_validation(0), a_work_list().of_validation(40)
    assert [item.seeds for item in before] == [item.seeds for item in after]
    seeds = [seed for item in before for seed in item.seeds]
    assert len(set(seeds)) == len(seeds)


def test_a_group_knows_its_question() -> None:
    work = a_work_list()
    assert work.question(a_group(group_id="3-000007")) == QUESTIONS[7]
    assert work.question(a_group(group_id="v12-000002", kind="validation")) == QUESTIONS[2]


def test_a_refill_asks_other_questions_and_each_attempt_others_again() -> None:
    work = a_work_list()
    asked = {item.group_id.rpartition("-")[2] for item in work.of_step(1)}
    first, second = work.refill(1, 1, 2), work.refill(1, 2, 2)
    assert [len(first), len(second)] == [2, 2]
    assert not asked & {item.group_id.rpartition("-")[2] for item in first + second}
    assert len({item.group_id for item in first + second}) == 4
    assert work.refill(1, 1, 2) == first
    # Six of the ten questions are not in the step.
    assert len(work.refill(1, 1, 99)) == 6
