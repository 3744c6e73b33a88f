"""One optimizer update: from the rows of a step to a gradient to new weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from retort.config import MethodConfig
from services.trainer.batch import StepBatch
from services.trainer.loss import aggregation_weights
from services.trainer.methods import Evidence, method_of
from services.trainer.moments import merge, moments
from services.trainer.packing import MicroBatch
from services.trainer.policy import Policy, sum_over_ranks
from services.trainer.ranks import gather_all
from services.trainer.rollout_correction import rollout_weights
from services.trainer.schedule import reweight_lambda


@dataclass(frozen=True)
class Update:
    """What one optimizer update did, over all ranks."""

    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    loss_statistics: Tensor
    """[3, 3], for `loss.loss_metrics`."""
    weight_statistics: Tensor
    """[4, 3], for `loss.weight_metrics`."""

    @property
    def is_finite(self) -> bool:
        """Whether the gradient was; otherwise the update changed nothing."""
        return math.isfinite(self.grad_norm)


class Gradient(NamedTuple):
    """What the policy has accumulated for an update that has not been made. On every rank."""

    loss: float
    statistics: Tensor
    """[7, 3], for `Update`."""


def update_policy(
    policy: Policy, batch: StepBatch, rows: Sequence[int], config: MethodConfig, *, learning_rate: float
) -> Update:
    """One optimizer update on the given rows of a step, whose old log-probs are known."""
    return make_update(policy, take_gradient(policy, batch, rows, config), learning_rate)


def take_gradient(
    policy: Policy, batch: StepBatch, rows: Sequence[int], config: MethodConfig, *, is_first: bool = False
) -> Gradient:
    """Backward passes over the given rows of a step.

    Rows without a gradient are left out of the passes, and count in the denominators of the loss. `is_first`: the
    policy is still that of the step's start, so that the rows' old log-probs are those of this very pass, which fills
    them in.
    """
    method = method_of(config)
    lengths = batch.lengths[rows]
    weights = torch.zeros(len(batch.rollouts), dtype=torch.float64)
    weights[rows] = aggregation_weights(
        method.parts.aggregation,
        lengths,
        num_sequences=len(rows),
        num_tokens=int(lengths.sum()),
        horizon=config.horizon,
    )
    loss = torch.zeros((), dtype=torch.float64)
    found = batch.old_logprobs.new_zeros(2, len(batch.old_logprobs), device=policy.device) if is_first else None
    active = set(batch.active_rows)
    # Counted once, not on every rank.
    idle = [row for row in rows if row not in active] if policy.rank == 0 else []
    statistics = [_idle_statistics(batch, idle, config)]
    for micro_batch in policy.micro_batches(batch, [row for row in rows if row in active], batch.prompts):
        scores = policy.differentiable_scores(micro_batch, entropies=is_first)
        if not micro_batch.rows:
            # Other ranks have rows in this pass and wait for this one's part of the collectives.
            scores.logprobs.sum().backward()
            continue
        tokens = batch.tokens_of(micro_batch.rows)
        if found is not None:
            found[:, tokens.to(policy.device)] = torch.stack(scores).detach()
        old_logprobs = scores.logprobs.detach() if is_first else batch.old_logprobs[tokens].to(scores.logprobs)
        share, share_statistics = _loss(scores.logprobs, old_logprobs, micro_batch, batch, weights, config)
        # FSDP averages gradients over ranks; the gradient of an update is the sum.
        (share * policy.ranks).backward()
        loss += share.detach().cpu()
        statistics.append(share_statistics.cpu())
    if found is not None:
        tokens = batch.tokens_of([row for row in rows if row in active])
        logprobs, entropies = sum_over_ranks(found)
        batch.old_logprobs[tokens], batch.entropies[tokens] = logprobs[tokens], entropies[tokens]
    return Gradient(float(gather_all(loss).sum()), merge(gather_all(merge(torch.stack(statistics)))))


def make_update(policy: Policy, gradient: Gradient, learning_rate: float) -> Update:
    """The optimizer's step. Where loss or gradient are not finite, nothing is changed."""
    # A loss can be NaN while its gradient is a clean 0, behind a clamp: such an update is no update either.
    grad_norm = policy.step(learning_rate) if math.isfinite(gradient.loss) else policy.drop_gradient()
    return Update(gradient.loss, grad_norm, learning_rate, gradient.statistics[:3], gradient.statistics[3:])


def _idle_statistics(batch: StepBatch, rows: Sequence[int], config: MethodConfig) -> Tensor:
    """Statistics [7, 3] of rows that no pass sees: without an advantage no clip binds and every token weight is 1.

    How far the policy moved on them is not known, so they have no part in that mean.
    """
    row = batch.row_of_tokens(rows)
    zeros = torch.zeros(len(row), dtype=torch.float64)
    evidence = Evidence(
        student_logprobs=zeros,
        teacher_logprobs=zeros,
        advantages=zeros,
        has_demonstration=batch.has_demonstration[row],
    )
    weights = method_of(config).reweighting(evidence, 0.0, config)
    return torch.cat([torch.stack([moments(zeros), moments(zeros), moments(zeros[:0])]), weights.statistics])


def _loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    micro_batch: MicroBatch,
    batch: StepBatch,
    weights: Tensor,
    config: MethodConfig,
) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the update's loss, with its gradient, and its statistics [7, 3]."""
    method = method_of(config)
    tokens, row = batch.tokens_of(micro_batch.rows), batch.row_of_tokens(micro_batch.rows)
    evidence = Evidence(
        student_logprobs=logprobs.detach(),
        teacher_logprobs=batch.teacher_logprobs[tokens].to(logprobs),
        advantages=batch.advantages[row].to(logprobs),
        has_demonstration=batch.has_demonstration[row].to(logprobs.device),
    )
    share = reweight_lambda(batch.step, initial=config.reweight_lambda, decay_steps=config.reweight_decay_steps)
    advantages = method.reweighting(evidence, share, config)
    batch.token_weights[tokens] = advantages.factor.float().cpu()
    result = method.surrogate(
        trainer_logprobs=logprobs,
        old_logprobs=old_logprobs,
        token_advantages=advantages.values,
        rollout_weights=rollout_weights(
            old_logprobs=old_logprobs,
            rollout_logprobs=batch.rollout_logprobs[tokens].to(logprobs),
            max_ratio=config.max_rollout_ratio,
        ),
        loss_weights=weights[row].to(logprobs),
        rows=row.to(logprobs.device),
        config=config,
    )
    return result.loss, torch.cat([result.statistics, advantages.statistics])
