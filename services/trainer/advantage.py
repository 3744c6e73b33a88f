"""What a group of rewards teaches: the advantage of each rollout, and whose completion the teacher is shown.

Rows are rollouts in any order; `groups` names the group of each row, and only equality of the names matters.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import mean, stdev
from typing import Literal


def group_advantages(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    *,
    scale: Literal["none", "std"] = "none",
    eps: float = 1e-6,
) -> list[float]:
    """Reward minus the mean of its group; with `std` also divided by the group's sample deviation plus `eps`.

        none  A = r - mean(group)                           Dr. GRPO, arXiv 2503.20783, and the reference run
        std   A = (r - mean(group)) / (std(group) + eps)    GRPO, arXiv 2402.03300; std with n - 1

    A group of one has mean 0 and deviation 1, so its advantage is its reward (verl's rule).
    """
    advantages = [0.0] * len(rewards)
    for rows in _rows_by_group(groups).values():
        members = [rewards[row] for row in rows]
        # `statistics` sums exactly: equal rewards have advantage 0 to the last bit, so sign(A) is 0 too.
        center, deviation = (float(mean(members)), float(stdev(members))) if len(rows) > 1 else (0.0, 1.0)
        divisor = deviation + eps if scale == "std" else 1.0
        for row in rows:
            advantages[row] = (rewards[row] - center) / divisor
    return advantages


def leave_one_out_advantages(rewards: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Reward minus the mean reward of the siblings: n / (n - 1) (r - mean(group)). A group of one keeps its reward.

    Source: RLOO, arXiv 2402.14740.
    """
    sizes = {group: len(rows) for group, rows in _rows_by_group(groups).items()}
    centered = group_advantages(rewards, groups)
    return [
        advantage * sizes[group] / max(1, sizes[group] - 1) for advantage, group in zip(centered, groups, strict=True)
    ]


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """What length adds to a completion's reward: 0, falling to -1 over the last `buffer` tokens before `max_length`.

    `buffer` 0 turns it off. Source: DAPO's soft overlong punishment, arXiv 2503.14476.
    """
    if buffer == 0:
        return 0.0
    return -min(1.0, max(0.0, (length - (max_length - buffer)) / buffer))


def demonstration_choice(
    rewards: Sequence[float], groups: Sequence[Hashable], *, threshold: float = 0.5, exclude_self: bool = True
) -> list[int | None]:
    """For each row, the row whose completion its teacher is shown; None where there is none.

    The first row of the same group with a reward of at least `threshold`, other than the row itself. The only
    winner of a group therefore has no demonstration. Source: the reference run (jungseongryong/L2T, after
    lasgroup/SDPO), there in the order after length balancing instead of rollout order.
    """
    members = _rows_by_group(groups)
    return [
        next(
            (
                candidate
                for candidate in members[group]
                if rewards[candidate] >= threshold and not (exclude_self and candidate == row)
            ),
            None,
        )
        for row, group in enumerate(groups)
    ]


def demonstration_metrics(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    demonstrations: Sequence[int | None],
    *,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Who can learn from whom in a step, under the names of lasgroup/SDPO. This method uses no feedback."""
    correct = [reward >= threshold for reward in rewards]
    shown = sum(demonstration is not None for demonstration in demonstrations) / len(rewards)
    members = _rows_by_group(groups).values()
    return {
        "self_distillation/success_group_fraction": mean(float(any(correct[row] for row in rows)) for rows in members),
        "self_distillation/success_sample_fraction": shown,
        "self_distillation/correct_sample_fraction": sum(correct) / len(rewards),
        "self_distillation/reprompt_sample_fraction": shown,
        "self_distillation/token_reweight_context_sample_fraction": shown,
        "self_distillation/token_reweight_correct_sample_fraction": sum(correct) / len(rewards),
        "self_distillation/feedback_available_fraction": 0.0,
        "self_distillation/feedback_used_fraction": 0.0,
        "self_distillation/empty_target_batch": float(shown == 0),
    }


def _rows_by_group(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    return rows
