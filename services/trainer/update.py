"""One optimizer update: from the rows of a step to a gradient to new weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.config import MethodConfig
from services.trainer.batch import StepBatch
from services.trainer.loss import aggregation_weights, policy_loss, rlsd_weights
from services.trainer.moments import merge
from services.trainer.packing import MicroBatch
from services.trainer.policy import Policy
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


def update_policy(
    policy: Policy, batch: StepBatch, rows: Sequence[int], method: MethodConfig, *, learning_rate: float
) -> Update:
    """One optimizer update on the given rows of a step: the mean over them of each one's mean token loss.

    Rows without advantage are left out of the passes, since their gradient is exactly 0, and count in the mean.
    """
    lengths = batch.lengths[rows]
    weights = torch.zeros(len(batch.rollouts), dtype=torch.float64)
    weights[rows] = aggregation_weights(
        "sequence_mean", lengths, num_sequences=len(rows), num_tokens=int(lengths.sum()), horizon=1
    )
    loss = torch.zeros((), dtype=torch.float64)
    statistics = [torch.zeros(7, 3, dtype=torch.float64)]
    active = [row for row in rows if batch.advantages[row]]
    for micro_batch in policy.micro_batches(batch, active, batch.prompts):
        logprobs = policy.logprobs(micro_batch)
        if not micro_batch.rows:
            # Other ranks have rows in this pass and wait for this one's part of the collectives.
            logprobs.sum().backward()
            continue
        share, share_statistics = _loss(logprobs, micro_batch, batch, weights, method)
        # FSDP averages gradients over ranks; the gradient of an update is the sum.
        (share * policy.ranks).backward()
        loss += share.detach().cpu()
        statistics.append(share_statistics.cpu())
    grad_norm = policy.step(learning_rate)
    merged = merge(gather_all(merge(torch.stack(statistics))))
    return Update(float(gather_all(loss).sum()), grad_norm, learning_rate, merged[:3], merged[3:])


def _loss(
    logprobs: Tensor, micro_batch: MicroBatch, batch: StepBatch, weights: Tensor, method: MethodConfig
) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the update's loss, with its gradient, and its statistics [7, 3]."""
    tokens, row = batch.tokens_of(micro_batch.rows), batch.row_of_tokens(micro_batch.rows)
    advantages = batch.advantages[row].to(logprobs)
    old_logprobs = batch.old_logprobs[tokens].to(logprobs)
    reweighting = rlsd_weights(
        student_logprobs=logprobs.detach(),
        teacher_logprobs=batch.teacher_logprobs[tokens].to(logprobs),
        advantages=advantages,
        has_demonstration=batch.has_demonstration[row].to(logprobs.device),
        reweight_lambda=reweight_lambda(
            batch.step, initial=method.reweight_lambda, decay_steps=method.reweight_decay_steps
        ),
        reweight_clip=method.reweight_clip,
    )
    batch.token_weights[tokens] = reweighting.factor.float().cpu()
    result = policy_loss(
        trainer_logprobs=logprobs,
        old_logprobs=old_logprobs,
        token_advantages=advantages * reweighting.factor,
        rollout_weights=rollout_weights(
            old_logprobs=old_logprobs,
            rollout_logprobs=batch.rollout_logprobs[tokens].to(logprobs),
            max_ratio=method.max_rollout_ratio,
        ),
        loss_weights=weights[row].to(logprobs),
        clip_low=method.clip_low,
        clip_high=method.clip_high,
        dual_clip=method.dual_clip,
    )
    return result.loss, torch.cat([result.statistics, reweighting.statistics])
