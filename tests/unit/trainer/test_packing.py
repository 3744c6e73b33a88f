import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.packing import MicroBatch, pack, plan

CPU = torch.device("cpu")
PROMPTS = [[1, 2], [3], None]
COMPLETIONS = [[7, 8, 9], [5], [6, 6]]


def packed(*rows: int) -> MicroBatch:
    return pack(list(rows), PROMPTS, COMPLETIONS, CPU)


@given(lengths=st.lists(st.integers(0, 50), max_size=30), ranks=st.integers(1, 5), token_budget=st.integers(1, 60))
def test_every_plan_is_complete_balanced_in_passes_and_within_the_budget(
    lengths: list[int], ranks: int, token_budget: int
) -> None:
    shares = plan(lengths, ranks=ranks, token_budget=token_budget, parity=10)
    dealt = [index for share in shares for micro_batch in share for index in micro_batch]
    assert sorted(dealt) == list(range(len(lengths)))
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    for micro_batch in (micro_batch for share in shares for micro_batch in share):
        tokens = sum(lengths[index] for index in micro_batch)
        assert tokens <= token_budget or len([index for index in micro_batch if lengths[index]]) == 1


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), ranks=st.integers(1, 5))
def test_no_rank_has_more_than_the_dearest_sequence_above_another(lengths: list[int], ranks: int) -> None:
    shares = plan(lengths, ranks=ranks, token_budget=100, parity=8)
    costs = [length + length**2 / 8 for length in lengths]
    loads = [sum(costs[index] for micro_batch in share for index in micro_batch) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def test_ranks_are_balanced_by_the_square_of_a_length_too() -> None:
    # In tokens 4 + 2 against 2 + 2. With n + n^2 the 4 costs 20 and each 2 costs 6: 20 against 18.
    assert plan([4, 2, 2, 2], ranks=2, token_budget=10, parity=math.inf) == [[[0, 3]], [[1, 2]]]
    assert plan([4, 2, 2, 2], ranks=2, token_budget=10, parity=1) == [[[0]], [[1, 2, 3]]]


def test_dear_micro_batches_meet_dear_ones_of_other_ranks() -> None:
    # With n + n^2 the loads go 30, 20, 20 + 20 for the first three, then 30 + 6 + 6 for the rest. The first rank's
    # micro-batch of 5 tokens costs 30 and its 2 + 2 costs 12; the other's fours cost 20 each.
    assert plan([5, 4, 4, 2, 2], ranks=2, token_budget=5, parity=1) == [[[0], [3, 4]], [[1], [2]]]
    # A micro-batch of ones fills up first and costs 2 + 2 + 2; the 3 that did not fit beside them costs 12.
    assert plan([3, 3, 2], ranks=1, token_budget=5, parity=1) == [[[0, 2], [1]]]


def test_the_longest_goes_first_and_the_rest_fills_up() -> None:
    # 9 | 7, then 3 joins the 7, 2 the 9, and the last 2 the 10 of the other rank.
    assert plan([2, 9, 3, 7, 2], ranks=2, token_budget=10, parity=math.inf) == [[[1], [0]], [[3, 2], [4]]]


def test_a_sequence_beyond_the_budget_is_alone_and_the_other_rank_keeps_it_company() -> None:
    assert plan([100, 1], ranks=2, token_budget=10, parity=math.inf) == [[[0]], [[1]]]
    assert plan([100], ranks=2, token_budget=10, parity=math.inf) == [[[0]], [[]]]


def test_nothing_to_do_is_no_pass_on_any_rank() -> None:
    assert plan([], ranks=3, token_budget=10, parity=math.inf) == [[], [], []]


def test_sequences_lie_one_after_the_other_with_positions_from_zero() -> None:
    batch = packed(0, 1)
    assert batch.input_ids.tolist() == [[1, 2, 7, 8, 9, 3, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.sequence_lengths == [5, 2]


def test_each_completion_token_is_predicted_by_the_one_before_and_the_first_by_the_prompt() -> None:
    batch = packed(0, 1)
    assert batch.predicting.tolist() == [1, 2, 3, 5]
    assert batch.targets.tolist() == [7, 8, 9, 5]


def test_rows_stand_in_the_order_asked_for() -> None:
    batch = packed(1, 0)
    assert batch.rows == [1, 0]
    assert batch.input_ids.tolist() == [[3, 5, 1, 2, 7, 8, 9]]
    assert batch.targets.tolist() == [5, 7, 8, 9]


def test_an_empty_completion_predicts_nothing() -> None:
    batch = pack([0, 1], [[1, 2], [3]], [[], [4]], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]]
    assert (batch.predicting.tolist(), batch.targets.tolist()) == ([2], [4])


def test_a_pass_without_rows_has_two_tokens_to_run_on_and_none_to_predict() -> None:
    batch = packed()
    assert batch.input_ids.tolist() == [[0, 0]]
    assert (batch.predicting.tolist(), batch.targets.tolist()) == ([], [])
