"""The network with the one output that training needs: log-probabilities of completion tokens.

There is never a [tokens, vocabulary] tensor of a whole micro-batch: the head runs over a few hundred tokens at a time
and is computed again in the backward pass.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from services.trainer.packing import MicroBatch
from services.trainer.segments import take

LOGITS_AT_ONCE = 2**25
"""Largest number of logits that exist at a time: 128 MiB in float32."""


class TokenScores(NamedTuple):
    logprobs: Tensor
    """[N] log-probability of every predicted token, at the sampling temperature."""
    entropies: Tensor
    """[N] entropy of the distribution it was taken from, in nats, detached."""


class PolicyModel(nn.Module):
    """A causal language model that scores packed completions."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, batch: MicroBatch, temperature: float) -> TokenScores:
        hidden = self.language_model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            use_cache=False,
        ).last_hidden_state[0]
        head = self.language_model.lm_head.weight
        if not batch.rows:
            # No token counts, but other ranks wait for this one's part of the collectives. The backward's need a
            # gradient of every parameter, an untied head included.
            return TokenScores((hidden.sum() + head.sum())[None] * 0, hidden.new_zeros(1))
        at_once = max(1, LOGITS_AT_ONCE // head.shape[0])
        scored = [
            checkpoint(_score, take(hidden, positions, 0), head, targets, temperature, use_reentrant=False)
            for positions, targets in zip(
                torch.split(batch.predicting, at_once), torch.split(batch.targets, at_once), strict=True
            )
        ]
        return TokenScores(torch.cat([lp for lp, _ in scored]), torch.cat([entropy for _, entropy in scored]))


def _score(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """hidden [n, d], head [V, d], targets [n] -> logprobs [n] and entropies [n], in float32 at least."""
    logits = F.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - normalizer
    with torch.no_grad():
        probabilities = (logits - normalizer[:, None]).exp_()
        entropies = normalizer - (probabilities * logits).sum(-1)
    return logprobs, entropies
