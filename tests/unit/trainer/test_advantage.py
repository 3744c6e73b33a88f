from hypothesis import given
from hypothesis import strategies as st

from services.trainer.advantage import demonstration_choice, demonstration_metrics, group_advantages


def test_advantage_is_reward_minus_the_mean_of_its_group() -> None:
    assert group_advantages([1, 0, 0, 1, 1, 0], ["a", "a", "a", "a", "b", "b"]) == [0.5, -0.5, -0.5, 0.5, 0.5, -0.5]


def test_a_group_is_told_by_its_name_not_by_its_place() -> None:
    assert group_advantages([1, 3, 0, 1], ["a", "b", "a", "b"]) == [0.5, 1.0, -0.5, -1.0]


def test_std_divides_by_the_sample_deviation_plus_eps() -> None:
    # Mean 2, squared deviations 4 and 4, divided by n - 1 = 1: the deviation is sqrt(8).
    assert group_advantages([0, 4], [0, 0], scale="std", eps=1.0) == [-2 / (8**0.5 + 1), 2 / (8**0.5 + 1)]


def test_a_group_of_one_keeps_its_reward() -> None:
    assert group_advantages([0.7], ["only"]) == [0.7]
    assert group_advantages([1.0], ["only"], scale="std", eps=0.25) == [0.8]


@given(st.floats(-1e6, 1e6), st.integers(1, 20).filter(lambda n: n > 1), st.sampled_from(["none", "std"]))
def test_a_group_of_equal_rewards_teaches_exactly_nothing(reward: float, n: int, scale: str) -> None:
    assert group_advantages([reward] * n, [0] * n, scale=scale) == [0.0] * n


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=1), st.randoms())
def test_the_order_of_rows_does_not_matter(rows: list[tuple[int, float]], random) -> None:
    order = random.sample(range(len(rows)), len(rows))
    straight = group_advantages([reward for _, reward in rows], [group for group, _ in rows])
    shuffled = group_advantages([rows[i][1] for i in order], [rows[i][0] for i in order])
    assert shuffled == [straight[i] for i in order]


def test_everybody_is_shown_the_first_winner_and_the_first_winner_the_second() -> None:
    assert demonstration_choice([0, 1, 0, 1, 1], [0] * 5) == [1, 3, 1, 1, 1]


def test_the_only_winner_of_a_group_is_shown_nothing() -> None:
    assert demonstration_choice([0, 1, 0], [0] * 3) == [1, None, 1]
    assert demonstration_choice([0, 1, 0], [0] * 3, exclude_self=False) == [1, 1, 1]


def test_demonstrations_come_from_the_own_group() -> None:
    assert demonstration_choice([1, 0, 0, 1], ["a", "b", "a", "b"]) == [None, 3, 0, None]


def test_a_reward_at_the_threshold_is_a_success() -> None:
    assert demonstration_choice([0.5, 0.4], [0, 0]) == [None, 0]


def test_demonstration_metrics_count_groups_and_samples() -> None:
    rewards, groups = [1, 0, 0, 0], ["a", "a", "b", "b"]
    metrics = demonstration_metrics(rewards, groups, demonstration_choice(rewards, groups))
    assert metrics["self_distillation/success_group_fraction"] == 0.5
    assert metrics["self_distillation/correct_sample_fraction"] == 0.25
    # Only the loser of group a is shown something.
    assert metrics["self_distillation/success_sample_fraction"] == 0.25
    assert metrics["self_distillation/reprompt_sample_fraction"] == 0.25
    assert metrics["self_distillation/empty_target_batch"] == 0.0
