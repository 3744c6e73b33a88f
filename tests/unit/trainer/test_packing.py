import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.packing import MicroBatch, RowSize, number_prompts, pack, plan

CPU = torch.device("cpu")
PROMPTS = [[1, 2], [3], None]
COMPLETIONS = [[7, 8, 9], [5], [6, 6]]


def packed(*rows: int) -> MicroBatch:
    return pack(list(rows), PROMPTS, COMPLETIONS, CPU)


def alone(*lengths: int) -> list[RowSize]:
    """Rows of so many tokens, each with a prompt of its own."""
    return [RowSize(prompt, 0, length) for prompt, length in enumerate(lengths)]


PROMPT_TOKENS = (0, 3, 20)
any_rows = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 50)).map(lambda one: RowSize(one[0], PROMPT_TOKENS[one[0]], one[1])),
    max_size=30,
)


@given(rows=any_rows, ranks=st.integers(1, 5), token_budget=st.integers(1, 60))
def test_every_plan_is_complete_balanced_in_passes_and_within_the_budget(
    rows: list[RowSize], ranks: int, token_budget: int
) -> None:
    shares = plan(rows, ranks=ranks, token_budget=token_budget, parity=10)
    dealt = [index for share in shares for micro_batch in share for index in micro_batch]
    assert sorted(dealt) == list(range(len(rows)))
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    for micro_batch in (micro_batch for share in shares for micro_batch in share):
        tokens = sum(rows[index].prompt_tokens + rows[index].completion_tokens for index in micro_batch)
        assert tokens <= token_budget or len([i for i in micro_batch if sum(rows[i][1:])]) == 1


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), ranks=st.integers(1, 5))
def test_no_rank_has_more_than_the_dearest_sequence_above_another(lengths: list[int], ranks: int) -> None:
    shares = plan(alone(*lengths), ranks=ranks, token_budget=100, parity=8)
    costs = [length + length**2 / 8 for length in lengths]
    loads = [sum(costs[index] for micro_batch in share for index in micro_batch) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def test_ranks_are_balanced_by_the_square_of_a_length_too() -> None:
    # In tokens 4 + 2 against 2 + 2. With n + n^2 the 4 costs 20 and each 2 costs 6: 20 against 18.
    rows = alone(4, 2, 2, 2)
    assert plan(rows, ranks=2, token_budget=10, parity=math.inf) == [[[0, 3]], [[1, 2]]]
    assert plan(rows, ranks=2, token_budget=10, parity=1) == [[[0]], [[1, 2, 3]]]


def test_dear_micro_batches_meet_dear_ones_of_other_ranks() -> None:
    # With n + n^2 the loads go 30, 20, 20 + 20 for the first three, then 30 + 6 + 6 for the rest. The first rank's
    # micro-batch of 5 tokens costs 30 and its 2 + 2 costs 12; the other's fours cost 20 each.
    assert plan(alone(5, 4, 4, 2, 2), ranks=2, token_budget=5, parity=1) == [[[0], [3, 4]], [[1], [2]]]
    # A micro-batch of ones fills up first and costs 2 + 2 + 2; the 3 that did not fit beside them costs 12.
    assert plan(alone(3, 3, 2), ranks=1, token_budget=5, parity=1) == [[[0, 2], [1]]]


def test_the_longest_goes_first_and_the_rest_fills_up() -> None:
    # 9 | 7, then 3 joins the 7, 2 the 9, and the last 2 the 10 of the other rank.
    assert plan(alone(2, 9, 3, 7, 2), ranks=2, token_budget=10, parity=math.inf) == [[[1], [0]], [[3, 2], [4]]]


def test_a_sequence_beyond_the_budget_is_alone_and_the_other_rank_keeps_it_company() -> None:
    assert plan(alone(100, 1), ranks=2, token_budget=10, parity=math.inf) == [[[0]], [[1]]]
    assert plan(alone(100), ranks=2, token_budget=10, parity=math.inf) == [[[0]], [[]]]


def test_nothing_to_do_is_no_pass_on_any_rank() -> None:
    assert plan([], ranks=3, token_budget=10, parity=math.inf) == [[], [], []]


def test_rows_of_a_prompt_go_to_one_rank_where_that_is_done_sooner() -> None:
    # By prompt 8 + 2 + 1 tokens a rank. One by one each rank gets a 2 and the other prompt's 1: 8 + 2 + 8 + 1.
    rows = [RowSize(0, 8, 2), RowSize(1, 8, 2), RowSize(1, 8, 1), RowSize(0, 8, 1)]
    assert plan(rows, ranks=2, token_budget=30, parity=math.inf) == [[[0, 3]], [[1, 2]]]


def test_rows_of_the_only_prompt_are_dealt_one_by_one_so_that_no_rank_is_idle() -> None:
    rows = [RowSize(0, 4, 9), RowSize(0, 4, 9)]
    assert plan(rows, ranks=2, token_budget=30, parity=math.inf) == [[[0]], [[1]]]


def test_a_shared_prompt_takes_room_for_each_of_its_completions() -> None:
    # 4 + 3 and 4 + 3 tokens fill the fifteen, though 4 + 3 + 3 are computed.
    rows = [RowSize(0, 4, 3)] * 3
    assert plan(rows, ranks=1, token_budget=15, parity=math.inf) == [[[0, 1], [2]]]


@given(rows=any_rows.filter(any), token_budget=st.integers(1, 60))
def test_attention_sees_at_most_half_as_many_keys_again_as_the_budget_has_tokens(
    rows: list[RowSize], token_budget: int
) -> None:
    prompts = [[row.prompt] * row.prompt_tokens for row in rows]
    completions = [[7] * row.completion_tokens for row in rows]
    [share] = plan(rows, ranks=1, token_budget=token_budget, parity=10)
    for micro_batch in share:
        batch = pack(micro_batch, prompts, completions, CPU)
        assert len(batch.segments.seen) <= max(1.5 * token_budget, *batch.sequence_lengths, 2)


def test_the_same_prompts_have_the_same_number_unless_they_are_not_shared_or_empty() -> None:
    prompts = [[1, 2], [3], [1, 2], None, []]
    assert number_prompts(prompts, share=True) == [0, 1, 0, 2, 3]
    assert number_prompts(prompts, share=False) == [0, 1, 2, 3, 4]


def test_completions_of_one_prompt_lie_behind_it_and_count_on_from_it() -> None:
    batch = pack([0, 1, 2], [[1, 2], [3], [1, 2]], [[7, 8, 9], [5], [6, 6]], CPU)
    assert batch.rows == [0, 2, 1]
    assert batch.input_ids.tolist() == [[1, 2, 7, 8, 9, 6, 6, 3, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1]]
    assert batch.spans == [(2, 0), (3, 2), (2, 2), (2, 0)]
    assert batch.sequence_lengths == [5, 4, 2]
    # The first token of each completion is predicted by the last of the prompt.
    assert batch.predicting.tolist() == [1, 2, 3, 1, 5, 7]
    assert batch.targets.tolist() == [7, 8, 9, 6, 6, 5]
    assert batch.segments.prefixes.tolist() == [-1, 0, 0, -1, -1]
    assert batch.segments.seen.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8]
    assert batch.segments.seen_bounds.tolist() == [0, 2, 7, 11, 13]
    assert (batch.segments.longest, batch.segments.longest_seen) == (3, 5)


def test_an_empty_completion_of_a_shared_prompt_has_no_segment() -> None:
    batch = pack([0, 1], [[1, 2]] * 2, [[], [4]], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 4]]
    assert batch.spans == [(2, 0), (1, 2)]
    assert (batch.predicting.tolist(), batch.targets.tolist()) == ([1], [4])


def test_sequences_lie_one_after_the_other_with_positions_from_zero() -> None:
    batch = packed(0, 1)
    assert batch.input_ids.tolist() == [[1, 2, 7, 8, 9, 3, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.spans == [(5, 0), (2, 0)]


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


def test_rows_without_any_token_are_a_pass_like_one_without_rows() -> None:
    batch = pack([0, 1], [[], None], [[], []], CPU)
    assert batch.input_ids.tolist() == [[0, 0]]
    assert batch.spans == [(2, 0)]
    assert (batch.predicting.tolist(), batch.targets.tolist()) == ([], [])
    batch = pack([0, 1], [[], [1, 2]], [[], [3]], CPU)
    assert batch.spans == [(3, 0)]
