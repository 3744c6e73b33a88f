"""Single tokens by hand, and the invariants that hold for all batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.trainer.loss import (
    Aggregation,
    PolicyLoss,
    TokenWeights,
    aggregation_weights,
    loss_metrics,
    policy_loss,
    rlsd_weights,
    weight_metrics,
)
from services.trainer.moments import merge
from services.trainer.rollout_correction import rollout_weights

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def loss_of(ratio: float, advantage: float, rollout_weight: float = 1.0) -> float:
    """The loss of a single token whose probability changed by `ratio`."""
    result = policy_loss(
        trainer_logprobs=number(math.log(ratio)),
        old_logprobs=number(0.0),
        token_advantages=number(advantage),
        rollout_weights=number(rollout_weight),
        loss_weights=number(1.0),
        **CLIP,
    )
    return result.loss.item()


def factor_of(*, student: float, teacher: float, advantage: float) -> float:
    """The factor on the advantage of a single token with these probabilities."""
    return rlsd_weights(
        student_logprobs=number(student).log(),
        teacher_logprobs=number(teacher).log(),
        advantages=number(advantage),
        has_demonstration=torch.tensor([True]),
        reweight_lambda=0.5,
        reweight_clip=0.2,
    ).factor.item()


def test_a_raised_probability_earns_no_more_than_the_clip() -> None:
    assert loss_of(ratio=1.1, advantage=1.0) == pytest.approx(-1.1)
    assert loss_of(ratio=1.5, advantage=1.0) == pytest.approx(-1.28)


def test_a_lowered_probability_of_a_bad_token_earns_no_more_than_the_clip() -> None:
    assert loss_of(ratio=0.5, advantage=-1.0) == pytest.approx(0.8)


def test_the_loss_of_a_bad_token_is_capped_by_the_dual_clip() -> None:
    assert loss_of(ratio=2.0, advantage=-1.0) == pytest.approx(2.0)
    assert loss_of(ratio=5.0, advantage=-1.0) == pytest.approx(3.0)


def test_the_rollout_weight_multiplies_after_clipping() -> None:
    assert loss_of(ratio=1.5, advantage=1.0, rollout_weight=2.0) == pytest.approx(-2.56)


def test_a_token_that_the_informed_teacher_likes_gets_more_credit() -> None:
    # w = 0.55 / 0.5 = 1.1 and half of it counts.
    assert factor_of(student=0.5, teacher=0.55, advantage=1.0) == pytest.approx(1.05)


def test_a_token_that_the_informed_teacher_likes_gets_less_blame() -> None:
    # w = 0.5 / 0.55 = 0.909 and half of it counts.
    assert factor_of(student=0.5, teacher=0.55, advantage=-1.0) == pytest.approx((1 + 0.5 / 0.55) / 2)


def test_the_weight_is_clipped_on_both_sides() -> None:
    assert factor_of(student=0.1, teacher=0.9, advantage=1.0) == pytest.approx(1.1)
    assert factor_of(student=0.9, teacher=0.1, advantage=1.0) == pytest.approx(0.9)


def test_a_token_that_the_teacher_rules_out_has_a_weight_all_the_same() -> None:
    assert factor_of(student=0.5, teacher=0.0, advantage=1.0) == pytest.approx(0.9)
    assert factor_of(student=0.5, teacher=0.0, advantage=-1.0) == pytest.approx(1.1)
    assert factor_of(student=0.5, teacher=0.0, advantage=0.0) == 1.0


def test_without_any_demonstration_the_reported_weights_are_one() -> None:
    weights = rlsd_weights(
        student_logprobs=number(-1),
        teacher_logprobs=number(math.nan),
        advantages=number(1),
        has_demonstration=torch.tensor([False]),
        reweight_lambda=0.5,
        reweight_clip=0.2,
    )
    assert list(weight_metrics(weights.statistics).values()) == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_the_aggregations_of_completions_of_one_three_and_no_tokens() -> None:
    lengths = torch.tensor([1, 3, 0])
    counts = {"num_sequences": 3, "num_tokens": 4, "horizon": 10}
    assert aggregation_weights("sequence_mean", lengths, **counts).tolist()[:2] == pytest.approx([1 / 3, 1 / 9])
    assert aggregation_weights("token_mean", lengths, **counts).tolist() == [0.25] * 3
    assert aggregation_weights("horizon", lengths, **counts).tolist() == pytest.approx([1 / 30] * 3)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "horizon"])
def test_an_update_of_empty_completions_has_a_loss_of_0(aggregation: Aggregation) -> None:
    weights = aggregation_weights(aggregation, torch.tensor([0, 0]), num_sequences=2, num_tokens=0, horizon=10)
    assert weights.isfinite().all()
    assert weights.repeat_interleave(torch.tensor([0, 0])).sum() == 0


@dataclass(frozen=True)
class Batch:
    """An update of R packed completions; per-completion tensors [R], per-token tensors [N]."""

    lengths: Tensor
    advantages: Tensor
    has_demonstration: Tensor
    trainer: Tensor
    old: Tensor
    rollout: Tensor
    teacher: Tensor

    def select(self, completions: list[int]) -> "Batch":
        """Some completions, in the given order."""
        ends = self.lengths.cumsum(0)
        spans = [torch.arange(int(ends[i] - self.lengths[i]), int(ends[i])) for i in completions]
        tokens = torch.cat([torch.arange(0), *spans])
        chosen = torch.tensor(completions, dtype=torch.long)
        return Batch(
            self.lengths[chosen],
            self.advantages[chosen],
            self.has_demonstration[chosen],
            *(logprobs[tokens] for logprobs in (self.trainer, self.old, self.rollout, self.teacher)),
        )


def run(
    part: Batch, update: Batch, *, reweight_lambda: float = 0.5, reweight_clip: float = 0.2
) -> tuple[TokenWeights, PolicyLoss]:
    """Token weights and loss of a micro-batch `part` of an `update`, composed as the trainer composes them."""
    rows = torch.arange(len(part.lengths)).repeat_interleave(part.lengths)
    advantages = part.advantages[rows]
    weights = rlsd_weights(
        student_logprobs=part.trainer.detach(),
        teacher_logprobs=part.teacher,
        advantages=advantages,
        has_demonstration=part.has_demonstration[rows],
        reweight_lambda=reweight_lambda,
        reweight_clip=reweight_clip,
    )
    loss_weights = aggregation_weights(
        "sequence_mean",
        part.lengths,
        num_sequences=len(update.lengths),
        num_tokens=int(update.lengths.sum()),
        horizon=1,
    )
    return weights, policy_loss(
        trainer_logprobs=part.trainer,
        old_logprobs=part.old,
        token_advantages=advantages * weights.factor,
        rollout_weights=rollout_weights(old_logprobs=part.old, rollout_logprobs=part.rollout, max_ratio=2.0),
        loss_weights=loss_weights[rows],
        **CLIP,
    )


def loss_and_gradient(batch: Batch, **options: float) -> tuple[Tensor, Tensor]:
    trainer = batch.trainer.clone().requires_grad_()
    batch = replace(batch, trainer=trainer)
    loss = run(batch, batch, **options)[1].loss
    loss.backward()
    assert trainer.grad is not None
    return loss.detach(), trainer.grad


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Random lengths, empty completions and a very long one among them, every kind of advantage, any drift."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 13, 200]), min_size=1, max_size=9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drift = draw(st.sampled_from([0.0, 0.05, 0.5, 5.0]))

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    old = -normal(sum(lengths)).abs()
    near = (old + drift * normal(sum(lengths)) for _ in range(3))
    advantages = draw(
        st.lists(st.sampled_from([-1.5, -0.125, 0.0, 0.875]), min_size=len(lengths), max_size=len(lengths))
    )
    demonstrations = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    trainer, rollout, teacher = near
    return Batch(
        torch.tensor(lengths),
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(demonstrations),
        trainer,
        old,
        rollout,
        teacher,
    )


def by_hand(batch: Batch) -> Iterator[tuple[float, float]]:
    """Loss and gradient of each token from the formulas, in plain Python, one completion at a time."""
    token = 0
    for length, advantage, informed in zip(
        batch.lengths.tolist(), batch.advantages.tolist(), batch.has_demonstration.tolist(), strict=True
    ):
        for _ in range(length):
            trainer, old, rollout, teacher = (
                logprobs[token].item() for logprobs in (batch.trainer, batch.old, batch.rollout, batch.teacher)
            )
            token += 1
            sign = (advantage > 0) - (advantage < 0)
            evidence = math.exp(min(max(sign * (teacher - trainer), -20), 20))
            a = advantage * (0.5 + 0.5 * min(max(evidence, 0.8), 1.2) if informed else 1)
            ratio = math.exp(min(max(trainer - old, -20), 20))
            loss, slope = -a * ratio, -a * ratio * (abs(trainer - old) <= 20)
            if -a * min(max(ratio, 0.8), 1.28) > loss:
                loss, slope = -a * min(max(ratio, 0.8), 1.28), 0.0
            if a < 0 and loss > -3 * a:
                loss, slope = -3 * a, 0.0
            weight = min(math.exp(min(max(old - rollout, -20), 20)), 2) / (len(batch.lengths) * length)
            yield weight * loss, weight * slope


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(1, 4), st.randoms())
def test_packing_over_ranks_and_micro_batches_changes_nothing(batch: Batch, ranks: int, random) -> None:
    tokens = list(by_hand(batch))
    trainer = batch.trainer.clone().requires_grad_()
    update = replace(batch, trainer=trainer)
    # Each completion lands on a rank and in one of its two micro-batches; some stay empty.
    slots: dict[tuple[int, int], list[int]] = {(rank, half): [] for rank in range(ranks) for half in (0, 1)}
    for completion in random.sample(range(len(batch.lengths)), len(batch.lengths)):
        slots[random.choice(list(slots))].append(completion)
    parts = [run(update.select(completions), update) for completions in slots.values()]
    torch.stack([loss.loss for _, loss in parts]).sum().backward()

    total = sum(loss.loss.item() for _, loss in parts)
    assert total == pytest.approx(sum(loss for loss, _ in tokens), rel=1e-10, abs=1e-10)
    expected = torch.tensor([slope for _, slope in tokens], dtype=torch.float64)
    torch.testing.assert_close(trainer.grad, expected, rtol=1e-10, atol=1e-10)
    whole_weights, whole = run(batch, batch)
    merged = merge(torch.stack([loss.statistics for _, loss in parts]))
    assert loss_metrics(merged) == pytest.approx(loss_metrics(whole.statistics), rel=1e-10, abs=1e-10)
    merged = merge(torch.stack([weights.statistics for weights, _ in parts]))
    assert weight_metrics(merged) == pytest.approx(weight_metrics(whole_weights.statistics), rel=1e-10, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(batches())
def test_four_ways_to_plain_grpo(batch: Batch) -> None:
    grpo = loss_and_gradient(replace(batch, has_demonstration=torch.zeros_like(batch.has_demonstration)))
    for same in (
        loss_and_gradient(batch, reweight_lambda=0.0),
        loss_and_gradient(batch, reweight_clip=0.0),
        loss_and_gradient(replace(batch, teacher=batch.trainer)),
    ):
        assert torch.equal(same[0], grpo[0])
        assert torch.equal(same[1], grpo[1])


@settings(max_examples=25, deadline=None)
@given(batches(), st.floats(0, 1), st.floats(0, 3))
def test_the_factor_keeps_the_sign_and_the_band(batch: Batch, reweight_lambda: float, reweight_clip: float) -> None:
    factor = run(batch, batch, reweight_lambda=reweight_lambda, reweight_clip=reweight_clip)[0].factor
    width = reweight_lambda * reweight_clip
    assert ((factor > 0) & (factor >= 1 - width - 1e-12) & (factor <= 1 + width + 1e-12)).all()


@settings(max_examples=25, deadline=None)
@given(batches())
def test_what_the_teacher_says_of_a_completion_it_was_not_informed_about_is_not_heard(batch: Batch) -> None:
    rows = torch.arange(len(batch.lengths)).repeat_interleave(batch.lengths)
    silent = ~batch.has_demonstration[rows]
    garbage = replace(batch, teacher=batch.teacher.masked_fill(silent, math.nan))
    for before, after in zip(loss_and_gradient(batch), loss_and_gradient(garbage), strict=True):
        assert torch.equal(before, after)


@settings(max_examples=25, deadline=None)
@given(batches(), st.randoms())
def test_the_order_of_completions_does_not_matter(batch: Batch, random) -> None:
    order = random.sample(range(len(batch.lengths)), len(batch.lengths))
    before, after = loss_and_gradient(batch), loss_and_gradient(batch.select(order))
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    gradient = replace(batch, trainer=before[1]).select(order).trainer
    torch.testing.assert_close(after[1], gradient, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(batches())
def test_a_group_without_differences_has_loss_and_gradient_zero(batch: Batch) -> None:
    loss, gradient = loss_and_gradient(replace(batch, advantages=torch.zeros_like(batch.advantages)))
    assert loss == 0
    assert not gradient.any()
